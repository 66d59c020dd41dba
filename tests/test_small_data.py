"""Datasets that are too small, or that lost photos: it is said before the training, and no run ends without weights."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pillsnap.cli import main
from pillsnap.config.load import load_settings
from pillsnap.config.schema import Settings
from pillsnap.data.manifest import prepare_data
from pillsnap.data.reading.records import DataError
from pillsnap.data.scan.scan import scan
from pillsnap.data.scan.summary import summary_lines
from pillsnap.evaluation.advisor import advise
from pillsnap.evaluation.evaluate import evaluate_run
from pillsnap.export.report import export_run
from pillsnap.metrics import NothingToEvaluate
from pillsnap.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from pillsnap.training.classifier_task import ClassifierTask
from pillsnap.training.run import train
from pillsnap.training.schedule import TrainingError
from pillsnap.training.trained import load_best


def photo(path: Path) -> Path:
    """A small picture of noise that is unique for its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(zlib.crc32(str(path).encode()))
    Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(path)
    return path


def class_folders(root: Path, drugs: int, photos: int) -> Path:
    """So many photos of each drug, without a split of their own."""
    for drug in range(drugs):
        for number in range(photos):
            photo(root / f"drug {drug}" / f"{number}.png")
    return root


def yolo(root: Path, splits: dict[str, int], names: tuple[str, ...], pills: int = 1) -> Path:
    """A dataset in YOLO format; the drugs take turns."""
    for split, count in splits.items():
        for number in range(count):
            photo(root / split / "images" / f"{split}{number}.png")
            label = root / split / "labels" / f"{split}{number}.txt"
            label.parent.mkdir(parents=True, exist_ok=True)
            boxes = [(number + pill) % len(names) for pill in range(pills)]
            label.write_text("".join(f"{drug} {0.3 + 0.4 * place} 0.5 0.2 0.4\n" for place, drug in enumerate(boxes)))
    folders = "".join(f"{split}: {split}/images\n" for split in splits)
    (root / "data.yaml").write_text(f"{folders}names: [{', '.join(names)}]\n")
    return root


def decisions_of(run: Path) -> dict[str, dict]:
    return {item["what"]: item for item in json.loads((run / "decisions.json").read_text(encoding="utf-8"))}


def refused(settings: Settings, tmp_path: Path) -> str:
    """Why a run is refused; it leaves no folder."""
    with pytest.raises((DataError, TrainingError)) as caught:
        train(settings, tmp_path / "runs" / "first")
    assert not (tmp_path / "runs").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Too few photos


def test_two_photos_of_each_drug_are_refused_with_what_to_set(tiny_settings: Callable[..., Settings], tmp_path: Path):
    data = class_folders(tmp_path / "data", drugs=6, photos=2)
    sentence = refused(tiny_settings("train.amp=off", data=data), tmp_path)
    assert "set data.min_class_images=2 data.validation_fraction=0 to train without validation" in sentence
    sentence = refused(tiny_settings("train.amp=off", "data.min_class_images=2", data=data), tmp_path)
    assert "no validation photo" in sentence and "set data.validation_fraction=0" in sentence


def test_two_photos_of_each_drug_train_without_validation(tiny_settings: Callable[..., Settings], tmp_path: Path):
    data = class_folders(tmp_path / "data", drugs=6, photos=2)
    settings = tiny_settings("train.amp=off", "data.min_class_images=2", "data.validation_fraction=0", data=data)
    run = train(settings, tmp_path / "run")
    decisions = decisions_of(run)
    assert {decisions[name]["choice"] for name in ("classifier validation", "detector validation")} == {"none"}
    assert decisions["held-out photos"]["fallback"]
    best, last = load_checkpoint(run / "best.pt"), load_checkpoint(run / "last.pt")
    for name in ("classifier", "detector"):
        kept = last["tasks"][name]["average"]
        assert all(torch.equal(tensor, kept[key]) for key, tensor in best[name].items()), "the last weights are kept"
    assert best["best"] == {}, "nothing was measured"
    assert advise(run, settings)["recommendation"] != "stop"
    with pytest.raises(NothingToEvaluate, match="no held-out photo"):
        evaluate_run(run, settings)
    assert not (run / "evaluation.json").exists()
    report = export_run(run, settings)
    assert report["passed"], report["failures"]


def test_without_validation_the_test_split_still_measures(tiny_settings: Callable[..., Settings], tmp_path: Path):
    data = class_folders(tmp_path / "data", drugs=2, photos=8)
    run = train(tiny_settings("train.amp=off", "data.validation_fraction=0", data=data), tmp_path / "run")
    assert evaluate_run(run, load_settings(run / "config.yaml"))["split"] == "test"


def test_without_test_split_the_validation_measures(tiny_settings: Callable[..., Settings], tmp_path: Path):
    data = class_folders(tmp_path / "data", drugs=2, photos=8)
    run = train(tiny_settings("train.amp=off", "data.test_fraction=0", data=data), tmp_path / "run")
    assert evaluate_run(run, load_settings(run / "config.yaml"))["split"] == "validation"


def test_a_run_without_validation_resumes(tiny_settings: Callable[..., Settings], tmp_path: Path):
    data = class_folders(tmp_path / "data", drugs=2, photos=6)
    settings = tiny_settings("train.amp=off", "data.validation_fraction=0", data=data)
    run = train(settings, tmp_path / "run")
    before = (run / "best.pt").read_bytes()
    train(settings.model_copy(update={"train": settings.train.model_copy(update={"resume": "last"})}), run)
    assert (run / "best.pt").read_bytes() == before


def test_one_drug_is_refused_and_trains_a_detector_alone(tiny_settings: Callable[..., Settings], tmp_path: Path):
    data = yolo(tmp_path / "data", {"train": 12, "val": 4}, ("pill",), pills=2)
    assert "train the detector alone with train.only=detector" in refused(
        tiny_settings("train.amp=off", data=data), tmp_path
    )
    run = train(tiny_settings("train.amp=off", "train.only=detector", data=data), tmp_path / "run")
    assert load_best(run)["networks"] == ["detector"]
    report = evaluate_run(run, load_settings(run / "config.yaml"))
    assert report["combo"]["pills"] == 8 and "single" not in report


def test_a_validation_part_of_copies_is_refused_with_the_reason(tiny_settings: Callable[..., Settings], tmp_path: Path):
    data = yolo(tmp_path / "data", {"train": 12, "val": 4}, ("red", "green"))
    for number in range(4):
        shutil.copy(data / "train" / "images" / f"train{number}.png", data / "val" / "images" / f"val{number}.png")
    sentence = refused(tiny_settings("train.amp=off", data=data), tmp_path)
    assert "validation part lost all 4 photos (twin_in_earlier_split 4)" in sentence


def test_validation_photos_that_cannot_be_decoded_are_refused_before_the_first_step(
    tiny_settings: Callable[..., Settings], tmp_path: Path
):
    data = yolo(tmp_path / "data", {"train": 12, "val": 4}, ("red", "green"))
    for path in (data / "val" / "images").iterdir():
        path.write_bytes(path.read_bytes()[:300])  # the header is whole
    sentence = refused(tiny_settings("train.amp=off", "data.leakage_check=off", data=data), tmp_path)
    assert "validation photos of the detector can be decoded" in sentence


def test_a_batch_may_be_larger_than_the_data(tiny_settings: Callable[..., Settings], tmp_path: Path):
    data = class_folders(tmp_path / "data", drugs=2, photos=4)
    run = train(
        tiny_settings("train.amp=off", "train.classifier.batch_size=64", "train.detector.batch_size=32", data=data),
        tmp_path / "r",
    )
    assert (run / "best.pt").exists()


def test_an_evaluation_that_fails_loses_no_weights(
    tiny_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*arguments: object) -> None:
        raise RuntimeError("the metric is broken")

    data = class_folders(tmp_path / "data", drugs=2, photos=8)
    with monkeypatch.context() as patch:
        patch.setattr(ClassifierTask, "score", fail)
        with pytest.raises(RuntimeError, match="the metric is broken"):
            train(tiny_settings("train.amp=off", data=data), tmp_path / "run")
    assert load_checkpoint(tmp_path / "run" / "last.pt")["tasks"]["classifier"]["seen"] > 0
    run = train(tiny_settings("train.amp=off", "train.resume=last", data=data), tmp_path / "run")
    assert (run / "best.pt").exists()


# What was lost


def heic(path: Path) -> None:
    """The head of a HEIC file without a picture, which no decoder reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(200))


def with_lost_drug(root: Path) -> Path:
    """Three drugs in class folders, none of whose photos of the third can be read."""
    class_folders(root, drugs=2, photos=8)
    for number in range(8):
        heic(root / "blue" / f"IMG_{number}.HEIC")
    return root


def test_a_drug_that_lost_all_photos_is_named_first(tiny_settings: Callable[..., Settings], tmp_path: Path):
    data = with_lost_drug(tmp_path / "data")
    run = train(tiny_settings("train.amp=off", data=data), tmp_path / "run")
    lines = (run / "run.log").read_text(encoding="utf-8").splitlines()
    (place,) = (number for number, line in enumerate(lines) if "dataset: 16 photos of 2 drugs (24 files found" in line)
    assert place < 6 and "drugs without a photo: 1 (they have lost all of their photos: blue)" in lines[place + 1]
    assert not any("no more with enough photos" in line for line in lines)
    report = json.loads((run / "data_report.json").read_text(encoding="utf-8"))
    assert report["drugs_without_photo"] == ["blue"] and "blue" in report["summary"][-1]


def test_scan_and_train_end_with_the_summary(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    data = with_lost_drug(tmp_path / "data")
    assert main(["scan", "--data-root", str(data), "--out", str(tmp_path / "manifest.parquet")]) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out)["drugs_without_photo"] == ["blue"]
    assert "1 drug has lost all of its photos: blue" in captured.err.splitlines()[-2:]
    assert "16 photos of 2 drugs: 24 files found, 16 used" in captured.err


def test_the_cache_command_ends_with_the_summary(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    data = with_lost_drug(tmp_path / "data")
    words = [f"paths.cache_root={tmp_path / 'cache'}", "model.classifier.image_size=64", "model.detector.image_size=64"]
    assert main(["cache", "build", "--profile", "cpu", "--data-root", str(data), *words]) == 0
    assert capfd.readouterr().err.splitlines()[-1] == "1 drug has lost all of its photos: blue"


def lost_in_yolo(root: Path) -> None:
    yolo(root, {"train": 6}, ("red", "green", "blue"))
    for label in sorted((root / "train" / "labels").iterdir()):
        if label.read_text().startswith("2 "):
            (root / "train" / "images" / f"{label.stem}.png").unlink()


def lost_in_coco(root: Path) -> None:
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(6)]
    boxes = [{"id": n, "image_id": n, "category_id": n % 3, "bbox": [5, 5, 20, 20]} for n in range(6)]
    names = [{"id": number, "name": name} for number, name in enumerate(("red", "green", "blue", "never used"))]
    for number in range(6):
        path = photo(root / "train" / f"{number}.png")
        if number % 3 == 2:
            path.unlink()
    content = {"images": images, "annotations": boxes, "categories": names}
    (root / "train" / "_annotations.coco.json").write_text(json.dumps(content))


def lost_in_aihub(root: Path) -> None:
    for code in ("K-000001", "K-000002"):
        stem = f"{code}_0_0_0_0_60_000_200"
        label = root / f"train/labels/single/TL_1_single/{code}_json/{stem}.json"
        label.parent.mkdir(parents=True)
        facts = {"drug_N": code, "width": 64, "height": 48, "dl_name": "red"}
        label.write_text(json.dumps({"images": [facts], "annotations": [{"bbox": [5, 5, 20, 20]}]}))
        if code == "K-000001":
            photo(root / f"train/images/single/TS_1_single/{code}/{stem}.png")


@pytest.mark.parametrize(
    ("write", "lost"), [(lost_in_yolo, "blue"), (lost_in_coco, "blue"), (lost_in_aihub, "K-000002")]
)
def test_every_layout_names_the_drugs_that_lost_all_photos(write: Callable[[Path], None], lost: str, tmp_path: Path):
    write(tmp_path / "data")
    report = scan(tmp_path / "data", tmp_path / "manifest.parquet", workers=1)
    assert report.drugs_without_photo == [lost]
    assert summary_lines(report)[-1] == f"1 drug has lost all of its photos: {lost}"
    assert scan(tmp_path / "data", tmp_path / "manifest.parquet", workers=1).drugs_without_photo == [lost], "cached"


def test_a_dataset_without_losses_has_one_quiet_line(tmp_path: Path, tiny_settings: Callable[..., Settings]):
    data = class_folders(tmp_path / "data", drugs=2, photos=8)
    first = prepare_data(tiny_settings("train.amp=off", data=data), data).decisions[0]
    assert (first.what, first.choice, first.fallback) == ("dataset", "16 photos of 2 drugs", False)
    assert first.reason == "16 files found, 16 used, 0 skipped, 0 put aside"


def test_a_run_stopped_before_its_second_network_is_no_run_of_one(tmp_path: Path):
    save_checkpoint({"networks": ["classifier", "detector"], "detector": {}}, tmp_path / "best_detector.pt")
    with pytest.raises(CheckpointError, match="has no weights of its classifier yet: go on with it"):
        load_best(tmp_path)
