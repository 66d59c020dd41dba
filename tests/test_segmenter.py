"""The segmenter: a run of the training loop on labels with outlines, the export of it, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from pillsnap.answer.outlines import FADED, OUTLINE_MARGIN, fade_outside, load_outliner
from pillsnap.config.load import load_settings
from pillsnap.config.schema import Settings
from pillsnap.data.manifest import load_dataset
from pillsnap.data.reading.records import DataError
from pillsnap.evaluation.advisor import advise
from pillsnap.evaluation.evaluate import evaluate_run
from pillsnap.evaluation.gate import checks_of
from pillsnap.export.report import export_run
from pillsnap.masks.mask_samples import segmenter_samples
from pillsnap.masks.network import fade_outside as fade_on_device
from pillsnap.runtime.boxes import Box
from pillsnap.runtime.outlines import encode_runs
from pillsnap.runtime.session import ModelError
from pillsnap.training.run import train
from pillsnap.training.trained import load_trained

SIZE = 96
SPLITS = ("train", "validation")
torch.set_num_threads(1)  # the crops are small, and other tests run beside these


def write_photos(root: Path, count: int, outlines: bool = True) -> Path:
    """A COCO dataset of bright ovals on a dark table, two of them touching."""
    rng, images, annotations = np.random.default_rng(5), [], []
    (root / "train").mkdir(parents=True)
    for number in range(count):
        photo = rng.integers(20, 60, (SIZE, SIZE, 3), np.uint8)
        middle = (int(rng.integers(30, 60)), int(rng.integers(30, 60)))
        for side in (-1, 1):
            mask = np.zeros((SIZE, SIZE), np.uint8)
            cv2.ellipse(mask, (middle[0] + side * 14, middle[1]), (13, 10), 0, 0, 360, 1, cv2.FILLED)
            photo[mask > 0] = rng.integers(150, 250, 3)
            left, top, width, height = cv2.boundingRect(mask)
            entry = {"id": len(annotations), "image_id": number, "category_id": 1, "bbox": [left, top, width, height]}
            annotations.append(entry | {"segmentation": encode_runs(mask) if outlines else []})
        cv2.imwrite(str(root / "train" / f"{number}.png"), photo)
        images.append({"id": number, "file_name": f"{number}.png", "width": SIZE, "height": SIZE})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "pill"}]}
    (root / "train" / "_annotations.coco.json").write_text(json.dumps(content))
    return root


def settings_for(folder: Path, data: Path, *more: str) -> Settings:
    overrides = [
        "train.only=segmenter",
        "model.segmenter.image_size=64",
        "train.segmenter.epochs=1",
        "train.segmenter.min_steps=60",
        "train.segmenter.batch_size=8",
        "train.segmenter.lr=3.0e-3",
        "train.ema_decay=0.9",
        "train.evaluations=1",
        "train.amp=off",
        "train.channels_last=false",
        "data.leakage_check=off",
        f"paths.cache_root={folder / 'cache'}",
        f"paths.run_root={folder / 'runs'}",
        *more,
    ]
    latest = {text.partition("=")[0]: text for text in overrides}
    return load_settings(profile="cpu", data_root=data, overrides=list(latest.values()))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Settings]:
    """A run that has learned to outline ovals."""
    folder = tmp_path_factory.mktemp("segmenter")
    settings = settings_for(folder, write_photos(folder / "data", 40))
    return train(settings, folder / "run"), settings


def test_a_run_learns_the_pill_of_the_box(trained: tuple[Path, Settings]) -> None:
    folder, _ = trained
    assert (folder / "best_segmenter.pt").is_file() and not (folder / "best.pt").exists()
    content = load_trained(folder)
    assert list(content.networks()) == ["segmenter"] and content.outline_size == 64
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "miou" in json.dumps(line)]
    assert len(measured) == 1, "the only evaluation is at the end"


def test_evaluation_measures_masks_at_the_photos_size(trained: tuple[Path, Settings]) -> None:
    folder, settings = trained
    report = evaluate_run(folder, settings)["outlines"]
    assert report["pills"] == 2 * report["photos"] and report["miou"] > 0.7, report
    assert report["outside_box"] < 0.1, "the touching neighbour is no part of the mask"
    codes = {reason["code"] for reason in advise(folder, settings)["reasons"]}
    assert "NOTHING_TRAINED" not in codes and ("OUTLINES_BELOW_GOAL" in codes) == (report["miou"] < 0.9)


def test_the_exported_file_answers_as_the_network(trained: tuple[Path, Settings]) -> None:
    folder, settings = trained
    evaluate_run(folder, settings)
    report = export_run(folder, settings)
    assert report["passed"] and report["networks"] == ["segmenter"]
    assert report["formats"]["onnx"]["segmenter"]["min_iou"] >= 0.99
    checks = {check.name: check for check in checks_of(folder, settings, "onnxruntime")}
    assert checks["size of the segmenter"].passed and checks["mean IoU of outlines"].figure
    outliner = load_outliner(folder / "export" / "segmenter.onnx")
    photo = cv2.imread(str(settings.paths.data_root / "train" / "0.png"))[..., ::-1]
    content = json.loads((settings.paths.data_root / "train" / "_annotations.coco.json").read_text())
    x, y, width, height = content["annotations"][0]["bbox"]
    (polygon,) = outliner.polygons(np.ascontiguousarray(photo), [Box(x, y, x + width, y + height)])
    around = np.reshape(polygon, (-1, 2))
    assert (
        np.abs(around.min(axis=0) - (x, y)).max() < 8 and np.abs(around.max(axis=0) - (x + width, y + height)).max() < 8
    )


def test_boxes_alone_teach_too(tmp_path: Path) -> None:
    root = write_photos(tmp_path / "data", 16)
    file = root / "train" / "_annotations.coco.json"
    content = json.loads(file.read_text())
    for annotation in content["annotations"][::2]:
        annotation["segmentation"] = []
    file.write_text(json.dumps(content))
    more = ("train.segmenter.boxes=true", "train.segmenter.min_steps=2")
    folder = train(settings_for(tmp_path, root, *more), tmp_path / "run")
    rows = load_dataset(folder).manifest
    sets = [segmenter_samples(rows.filter(split=split), settings_for(tmp_path, root, *more)) for split in SPLITS]
    assert not sets[0].outlined(range(len(sets[0]))).all() and sets[1].outlined(range(len(sets[1]))).all()
    assert (folder / "best_segmenter.pt").is_file()


def test_it_trains_in_turn_with_the_others(tiny_settings: Callable[..., Settings], tmp_path: Path) -> None:
    own = ["train.segmenter.interleaved=true", "model.segmenter.image_size=64", "train.segmenter.batch_size=8"]
    own += ["train.segmenter.epochs=1", "train.segmenter.min_steps=0", "train.evaluations=1"]
    settings = tiny_settings(*own)
    folder = train(settings, tmp_path / "run")
    assert list(load_trained(folder).networks()) == ["classifier", "detector", "segmenter"]
    report = evaluate_run(folder, settings)
    assert report["outlines"]["pills"] > 0 and "single" in report and "combo" in report
    assert export_run(folder, settings)["networks"] == ["classifier", "detector", "segmenter"]


def test_a_file_that_is_no_segmenter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="There is no model"):
        load_outliner(tmp_path / "segmenter.onnx")


def test_labels_without_outlines_end_with_a_sentence(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, write_photos(tmp_path / "data", 12, outlines=False))
    with pytest.raises(DataError, match="No label of the training photos has an outline") as raised:
        train(settings, tmp_path / "run")
    assert "\n" not in str(raised.value) and not (tmp_path / "run").exists(), "nothing is left half-written"


def test_training_and_serving_fade_alike() -> None:
    crop = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)
    box = Box(6.4, 9.5, 25.6, 22.5)
    served = fade_outside(crop, box)
    images = torch.from_numpy(crop).permute(2, 0, 1)[None].float() / 255
    assert np.abs(fade_on_device(images, torch.tensor([list(box)]))[0].numpy() - served).max() < 1e-6
    assert 0 < FADED < 1 and OUTLINE_MARGIN > 0.12
