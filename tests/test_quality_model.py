"""The quality model from photos with boxes to a served verdict, and what it says to bad input."""

import json
from pathlib import Path

import cv2
import numpy as np
import polars as pl
import pytest
from PIL import Image

from pillsnap import cli
from pillsnap.answer.quality.judge import load_judge
from pillsnap.answer.quality.reasons import REASONS
from pillsnap.bench.quality.plain import plain_pill
from pillsnap.config.load import load_settings
from pillsnap.data.manifest import prepare_data
from pillsnap.quality import train
from pillsnap.quality.degradations.table import DEGRADATIONS, Draw
from pillsnap.quality.learn import LearningOptions
from pillsnap.quality.network import QualityNetwork
from pillsnap.runtime.session import ModelError


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn photos of white and red pills in the layout of YOLO, one of them damaged."""
    root = tmp_path_factory.mktemp("drawn")
    for part, seeds in (("train", range(40)), ("val", range(100, 120))):
        for kind in ("images", "labels"):
            (root / kind / part).mkdir(parents=True)
        for seed in seeds:
            scene = plain_pill(seed, (320, 240))
            photo, (x1, y1, x2, y2) = scene.photo.copy(), scene.pill
            if seed % 2:
                centre = (round((x1 + x2) / 2), round((y1 + y2) / 2))
                cv2.circle(photo, centre, round((y2 - y1) / 4), (190, 40, 50), -1, cv2.LINE_AA)
            Image.fromarray(photo).save(root / "images" / part / f"{part}{seed}.png")
            row = f"{seed % 2} {(x1 + x2) / 640} {(y1 + y2) / 480} {(x2 - x1) / 320} {(y2 - y1) / 240}\n"
            (root / "labels" / part / f"{part}{seed}.txt").write_text(row)
    damaged = root / "images" / "train" / "train3.png"
    damaged.write_bytes(damaged.read_bytes()[:-900])
    (root / "data.yaml").write_text("names: [white, red]\ntrain: images/train\nval: images/val\n")
    return root


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Folder of a quality model that was trained for two epochs by the command, and the settings that it took."""
    out = tmp_path_factory.mktemp("quality")
    words = ["--data-root", str(dataset), "--out", str(out), "--profile", "cpu", f"paths.cache_root={out / 'cache'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "LearningOptions", lambda: LearningOptions(copies=1, epochs=3, batch=16))
        patch.setattr(train, "QualityNetwork", lambda backbone: QualityNetwork("random:test_efficientnet"))
        assert cli.main(["quality", "train", *words]) == 0
    return out, words


def test_a_damaged_photo_is_left_out_and_the_training_goes_on(trained: tuple[Path, list[str]]):
    report = json.loads((trained[0] / "quality_report.json").read_text())
    assert report["photos"]["training"] + report["photos"]["held_out"] == 40 + report["rendered"]
    assert sum(report["examples"].values()) <= 4 * (39 + report["rendered"])
    assert len(report["history"]) == 3 and report["onnx_difference"] < 1e-3 and report["megabytes"] < 5


def test_the_test_and_the_grades_read_the_trained_file(
    trained: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["quality", "test", *trained[1]]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["photos"] == 20 and 0 <= measured["pairwise"] <= 1 and set(measured["reasons_f1"]) <= set(REASONS)
    assert cli.main(["quality", "grade", *trained[1]]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head == "image,score,tier,reasons" and len(rows) in (59, 60)
    scores = [float(row.split(",")[1]) for row in rows]
    assert scores == sorted(scores)


def test_a_verdict_has_sentences_in_both_languages(trained: tuple[Path, list[str]]):
    judge = load_judge(trained[0] / "quality.onnx")
    scene = plain_pill(200)
    for name, row in DEGRADATIONS.items():
        changed = Draw(name, row.train[2], "C", 1).apply(scene)
        verdict = judge.judge(changed.photo, *changed.boxes).to_json()
        assert 0 <= verdict["score"] <= 1 and verdict["tier"] in "SABC"
        for reason in verdict["reasons"]:
            assert set(reason) == {"reason", "probability", "ko", "en"} and reason["reason"] in REASONS
        json.dumps(verdict)


def test_photos_of_any_size_are_judged(trained: tuple[Path, list[str]]):
    judge = load_judge(trained[0] / "quality.onnx")
    for shape in ((1, 1, 3), (2, 3000, 3), (3000, 2, 3), (96, 96, 3)):
        assert 0 <= judge.judge(np.zeros(shape, np.uint8)).score <= 1


@pytest.mark.parametrize("content", [None, b"", b"no model"])
def test_a_missing_or_damaged_file_is_a_sentence(tmp_path: Path, content: bytes | None):
    path = tmp_path / "quality.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match="quality.onnx"):
        load_judge(path)


def test_the_command_without_a_model_names_what_to_do(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["quality", "grade", "--data-root", str(dataset), "--out", str(tmp_path)]) == 2
    assert "train one, or name its file with --model" in capsys.readouterr().err


def test_a_scan_grades_photos_and_a_training_leaves_out_the_poor(
    trained: tuple[Path, list[str]], dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    table, model = tmp_path / "manifest.parquet", trained[0] / "quality.onnx"
    words = ["--data-root", str(dataset), "--out", str(table), "--workers", "1", "--grade", str(model)]
    assert cli.main(["scan", *words]) == 0
    assert "photos graded (" in capsys.readouterr().err
    grades = pl.read_csv(tmp_path / "grades.csv")
    assert grades.columns == ["image", "score", "tier", "reasons"] and grades["score"].is_sorted()
    bound = float(grades["score"].quantile(0.2)) + 1e-6  # whatever was learned, photos of both drugs are left
    poor = grades.filter(pl.col("score") < bound, pl.col("image").str.contains("/train/"))
    settings = load_settings(
        profile="cpu",
        data_root=dataset,
        overrides=[f"data.grades={tmp_path / 'grades.csv'}", f"data.min_score={bound}", "data.leakage_check=off"]
        + ["data.min_class_images=1", f"paths.cache_root={tmp_path / 'cache'}"],
    )
    data = prepare_data(settings, dataset)
    assert data.report["left_out"]["poor_photo"] == len(poor) > 0
    assert not set(poor["image"]) & set(data.manifest.filter(pl.col("split") == "train")["image"])
    assert any(decision.what == "poor photos" and "data.min_score" in decision.reason for decision in data.decisions)


def test_a_scan_without_the_model_it_grades_with_is_a_sentence(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = [
        "--data-root",
        str(dataset),
        "--out",
        str(tmp_path / "table.parquet"),
        "--grade",
        str(tmp_path / "none.onnx"),
    ]
    assert cli.main(["scan", *words]) == 2
    assert "none.onnx" in capsys.readouterr().err
