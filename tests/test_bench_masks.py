"""`make bench-masks` in small, from composed photos to its report."""

from __future__ import annotations

import json
import zipfile
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from pillsnap.bench.errors import BenchError
from pillsnap.bench.masks import main as bench
from pillsnap.bench.masks.measures import box_of
from pillsnap.masks.cutouts import MaskError

torch.set_num_threads(1)  # the crops are small, and other tests run beside these
COLORS = {"red": (205, 60, 50), "blue": (60, 80, 190), "white": (232, 230, 224)}
FAST = [
    "model.segmenter.image_size=32",
    "train.segmenter.min_steps=2",
    "train.segmenter.batch_size=4",
    "export.compare=smoke",
]


def pill(color: tuple[int, ...], ground: int, rng: np.random.Generator) -> np.ndarray:
    photo = np.full((160, 200, 3), ground, np.uint8)
    cv2.ellipse(photo, (50, 40), (30, 22), float(rng.integers(180)), 0, 360, color, -1, cv2.LINE_AA)
    return photo


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Pills in the layout of YOLO, some photos with two, studio photos in a ZIP, and phone photos."""
    root, rng = tmp_path / "tray", np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for number, (name, color) in enumerate(COLORS.items()):
            for copy in range(count):
                photo = pill(color, int(rng.integers(150, 210)), rng)
                cv2.imwrite(str(root / "images" / split / f"{name}{copy}.png"), photo)
                (root / "labels" / split / f"{name}{copy}.txt").write_text(
                    f"{number} 0.25 0.25 0.3 0.36\n{number} 0.25 0.25 0.28 0.3\n"
                )
    names = ", ".join(COLORS)
    (root / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames: [{names}]\n")
    with zipfile.ZipFile(tmp_path / "studio.zip", "w") as archive:
        for name, color in COLORS.items():
            cv2.imwrite(str(tmp_path / "front.png"), pill(color, 0, rng)[:90, :110])
            archive.write(tmp_path / "front.png", f"{name}/front.png")
            (tmp_path / "phone" / name).mkdir(parents=True)
            cv2.imwrite(str(tmp_path / "phone" / name / "1_front.png"), pill(color, 180, rng)[:90, :110])
    return tmp_path


def test_everything_in_small(
    data: Path, tiny_data: Path, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "measure", partial(bench.measure, counts=(6, 2), sampled=6))
    given = ["--data", f"pushin={data / 'tray'}", "--studio", str(data / "studio.zip"), "--phone", str(data / "phone")]
    given += [
        "--sample",
        str(tiny_data),
        "--detector",
        str(models),
        "--draws",
        "2",
        "--pairs",
        "2",
        "--out",
        str(data / "out"),
        *FAST,
    ]
    assert bench.main(given) == 0
    report = json.loads((data / "out" / "masks.json").read_text())
    assert report["benchmark"] == "masks" and report["seconds"] > 0
    goals = {item["name"]: item for item in report["goals"]}
    assert set(goals) == {
        "sample_map",
        "sample_miou",
        "sample_boundary_f",
        "composed_miou",
        "touching_separated",
        "pushin_box_iou",
        "outside_box",
        "size_error",
        "pushin_cutout_gain",
        "phone_cutout_gain",
        "crop_ms",
    }
    assert goals["pushin_box_iou"]["n"] == 12 and goals["touching_separated"]["n"] == 2
    assert all(item["value"] is not None for item in goals.values())
    assert "pushin: top-1" in capsys.readouterr().out


def test_options_that_can_not_be_used_end_with_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    studio = ["--studio", str(tmp_path / "studio.zip"), "--out", str(tmp_path / "out")]
    assert bench.main(studio) == 2 and "--data takes NAME=DIR" in capsys.readouterr().err
    (tmp_path / "data").mkdir()
    with pytest.raises((BenchError, MaskError)) as raised:
        bench.measure(bench.parse([*studio, "--data", f"tray={tmp_path / 'data'}"]))
    assert "\n" not in str(raised.value) and not (tmp_path / "out" / "masks.json").exists()


def test_the_box_of_a_mask() -> None:
    mask = np.zeros((20, 30), bool)
    assert box_of(mask) == (0, 0, 0, 0)
    mask[3:7, 10:20] = True
    assert box_of(mask) == (10, 3, 20, 7)
