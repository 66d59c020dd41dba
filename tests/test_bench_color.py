"""`make bench-color` in small, from drawn photos to its report."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import TINY
from PIL import Image

from pillsnap.bench.color import main as bench
from pillsnap.bench.color import speed
from pillsnap.bench.rules import main as rules

COLORS = {"red": (205, 60, 50), "blue": (60, 80, 190), "white": (232, 230, 224)}
FAST = [
    "color.min_steps=4",
    "color.epochs=1",
    "color.batch_size=2",
    "color.image_size=16",
    "color.lut_size=5",
    "color.batch_colors=40000",
    "color.hidden_dims=[16]",
    "train.evaluations=1",
]


def pill(color: tuple[int, ...], ground: int, rng: np.random.Generator) -> np.ndarray:
    photo = np.full((80, 100, 3), ground, np.uint8)
    cv2.ellipse(photo, (50, 40), (24, 18), float(rng.integers(180)), 0, 360, color, -1, cv2.LINE_AA)
    return photo


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Pills in the layout of YOLO, studio photos in a ZIP, and phone photos."""
    root, rng = tmp_path / "tray", np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 2)):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for number, (name, color) in enumerate(COLORS.items()):
            for copy in range(count):
                photo = pill(color, int(rng.integers(150, 210)), rng)
                Image.fromarray(photo).save(root / "images" / split / f"{name}{copy}.png")
                (root / "labels" / split / f"{name}{copy}.txt").write_text(f"{number} 0.5 0.5 0.52 0.52\n")
    Image.fromarray(pill((40, 160, 60), 180, rng)).save(root / "images" / "val" / "unknown.png")
    (root / "labels" / "val" / "unknown.txt").write_text("3 0.5 0.5 0.52 0.52\n")
    names = ", ".join((*COLORS, "Unknown"))
    (root / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames: [{names}]\n")
    with zipfile.ZipFile(tmp_path / "studio.zip", "w") as archive:
        for name, color in COLORS.items():
            Image.fromarray(pill(color, 0, rng)).save(tmp_path / "front.png")
            archive.write(tmp_path / "front.png", f"{name}/front.png")
            (tmp_path / "phone" / name).mkdir(parents=True)
            taken = (pill(color, 180, rng) * [1.0, 0.9, 0.7]).astype(np.uint8)
            Image.fromarray(taken).save(tmp_path / "phone" / name / "1_front.png")
    return tmp_path


@pytest.fixture(autouse=True)
def small_photos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "pillow_times", lambda: speed.pillow_times((64, 48), 2))
    monkeypatch.setattr(bench, "correction_times", lambda correct: speed.correction_times(correct, (64, 48), 2))


def test_everything_in_small(data: Path, capsys: pytest.CaptureFixture[str]):
    given = ["--data", f"tray={data / 'tray'}", "--studio", str(data / "studio.zip"), "--phone", str(data / "phone")]
    assert bench.main([*given, "--fit", "--draws", "2", "--out", str(data / "out"), *FAST]) == 0
    report = json.loads((data / "out" / "color.json").read_text())
    assert report["benchmark"] == "color" and report["seconds"] > 0
    goals = {item["name"]: item for item in report["goals"]}
    assert set(goals) == {
        "tray_light_loss",
        "as_is_gain",
        "over_simple",
        "de2000_median",
        "de2000_p95",
        "de2000_canonical",
        "phone_de2000_reduction",
        "phone_de2000_over_simple",
        "phone_top1_gain",
        "phone_top5_gain",
        "nilut_bake_de76",
        "nilut_kilobytes",
        "pillow_1080p_ratio",
        "megapixels12_ms",
    }
    assert all(item["value"] is not None for item in goals.values()) and goals["de2000_canonical"]["value"] == 0
    assert goals["tray_light_loss"]["at_most"] == 0.01, "every photo of the set shows one pill"
    assert set(report["values"]["top1"]["tray"]) == {"none", "gray_world", "shades_of_gray", "learned"}
    found = report["values"]["lights"]["tray"]
    assert found["learned"]["warm"]["median"] < found["none"]["warm"]["median"] / 2, "a uniform light is taken out"
    fitted, served = report["values"]["fitted"], report["values"]["learned"]
    assert set(fitted) == set(served) == {"brightness", "color", "level", "pill", "white", "shared", "darker"}
    assert sum(fitted["brightness"]) == pytest.approx(1, abs=1e-3) == sum(served["color"])
    assert fitted["white"] != served["white"], "that of these studio photos"
    draws = report["values"]["draws"]["tray"]
    for name in ("light_loss", "as_is_gain", "over_simple"):
        low, high = np.percentile([draw[name] for draw in draws], [25, 75])
        item = goals[f"tray_{name}" if name == "light_loss" else name]
        assert len(draws) == 2 and item["spread"] == pytest.approx(high - low, abs=2e-4)
        assert item["n"] == 6, "the pill that no gallery has is no question"
    for name, found in report["values"]["runs"].items():
        assert len(found) == goals[name]["n"] and goals[name]["value"] == pytest.approx(np.median(found), abs=1e-3)
    low, high = report["values"]["intervals"]["tray"]["light_loss"]
    assert low <= goals["tray_light_loss"]["value"] <= high
    assert "nilut kilobytes" in capsys.readouterr().out
    before = (data / "out" / "color" / "nilut" / "best.pt").stat().st_mtime_ns
    assert bench.main(["--out", str(data / "out"), *FAST]) == 0
    assert (data / "out" / "color" / "nilut" / "best.pt").stat().st_mtime_ns == before, "trained once"


@pytest.mark.parametrize("words", [["--data", "tray"], ["--data", "tray=nowhere"]])
def test_options_that_can_not_be_used_are_one_sentence(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert bench.main([*words, "--out", str(tmp_path / "out")]) == 2
    assert "--data takes NAME=DIR" in capsys.readouterr().err


def test_phones_are_compared_with_the_studio(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert bench.main(["--phone", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "--phone needs --studio" in capsys.readouterr().err


def test_rules_are_compared_with_trained_classifiers(data: Path, capsys: pytest.CaptureFixture[str]):
    words = ["--data", f"tray={data / 'tray'}", "--out", str(data / "out")]
    assert rules.main([*words, *TINY, "data.min_class_images=1", "train.classifier.epochs=1"]) == 0
    report = json.loads((data / "out" / "rules.json").read_text())
    top1 = report["values"]["top1"]["tray"]
    assert set(top1) == {rules.KEPT, "learned"} and len(top1["learned"]) == 6
    gain = np.mean([value[0] - top1["learned"][light][0] for light, value in top1[rules.KEPT].items()])
    assert [item["name"] for item in report["goals"]] == ["uncorrected_gain"]
    assert abs(report["goals"][0]["value"] - gain) < 1e-4 and "tray, learned: as is" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--seeds", "4"], ["--segmenter", "missing.onnx"]])
def test_rules_that_cannot_be_compared(data: Path, words: list[str], capsys: pytest.CaptureFixture[str]):
    assert rules.main(["--data", f"tray={data / 'tray'}", "--out", str(data / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert words[0] in error and error.count("\n") == 1 and not (data / "out").exists()
