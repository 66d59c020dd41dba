"""Models of every kind are registered by their figure: colour, quality and outlines, next to those that name pills."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_registry import said
from tiny_models import photo_jpeg, save_quality

from pillsnap.atomic import sha256, write_json
from pillsnap.config.load import load_settings
from pillsnap.registry.follow import tracked
from pillsnap.registry.records import DATA_FILE, record_run
from pillsnap.registry.registered import THRESHOLDS, figure_of, registered
from pillsnap.registry.tracking import open_tracking
from pillsnap.registry.weights import fetch_checked, run_of_folder
from pillsnap.runlog import open_run
from pillsnap.runtime.color.cube_write import write_cube
from pillsnap.runtime.color.lut import Grid, Lut, identity_table


@pytest.fixture
def place(url: str, tmp_path: Path) -> list[str]:
    """Settings of a store, of records and of a cache."""
    return [url, f"store.url={tmp_path / 'store'}", f"paths.cache_root={tmp_path / 'cache'}"]


def refused(text: str, metric: str, setting: str, bound: str) -> None:
    """The sentence has the figure and its goal."""
    assert re.search(rf"not registered: {metric} is [\d.e+-]+, but {setting} asks for {bound}", text), text


def only(place: list[str], task: str) -> dict[str, str]:
    """Tags of the one registered version of a kind."""
    (version,) = registered(open_tracking(load_settings(profile="cpu", overrides=place)), task)
    return version.tags


@pytest.mark.parametrize("model, task", [("nilut", "nilut"), ("adaptive_3dlut", "lut3d")])
def test_models_of_colours(
    model: str, task: str, place: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cube(Lut(grid=Grid(identity_table(5) * (1.0, 0.9, 0.7))), tmp_path / "luts" / "warm.cube")
    for folder, gains in (("raw", 1.0), ("processed", 0.5)):
        (tmp_path / "pairs" / folder).mkdir(parents=True)
        for number in range(4):
            photo = np.random.default_rng(number).integers(0, 256, (24, 32, 3)) * gains
            Image.fromarray(photo.astype(np.uint8)).save(tmp_path / "pairs" / folder / f"{number}.png")
    data = ["color.data_type=cube", f"color.cube_dir={tmp_path / 'luts'}"] if model == "nilut" else []
    tiny = ["color.hidden_dims=[16]", "color.batch_colors=256", "color.image_size=16", "color.lut_size=5"]
    short = ["color.epochs=1", "color.min_steps=6", "color.batch_size=2", "train.evaluations=1", f"color.model={model}"]
    run = tmp_path / "run"
    root = ["--data-root", str(tmp_path / "pairs")]
    said(capsys, "color", "train", "--run-dir", str(run), *root, *place, *data, *tiny, *short)
    said(capsys, "color", "push", "--run-dir", str(run), "--size", "5", *place)
    register = ["models", "register", task, "--run", str(run), *place]
    text = said(capsys, *register, "goals.color_de=0.0001", status=1)
    refused(text, f"{task}/validation/de76", "goals.color_de", "at most 0.0001")
    assert "champion" in said(capsys, *register, "goals.color_de=1000")
    tags = only(place, task)
    assert tags[f"sha256.store.{task}.best.pt"] == sha256(run / "best.pt")
    assert tags[f"weights.{task}"].endswith(f"/models/{task}/v1")
    (tmp_path / "photo.png").write_bytes((tmp_path / "pairs" / "raw" / "0.png").read_bytes())
    first, later = (tmp_path / name for name in ("first", "later"))
    for out in (first, later):
        out.mkdir()
        said(capsys, "models", "infer", task, str(tmp_path / "photo.png"), "--out", str(out), *place)
    made = sorted(path.name for path in first.iterdir())
    assert made and all((first / name).read_bytes() == (later / name).read_bytes() for name in made)


def quality_run(place: list[str], run: Path, pairwise: float) -> Path:
    """A tracked run folder as a training of the quality model leaves it."""
    settings = load_settings(profile="cpu", overrides=place)
    with tracked(settings), open_run(run, settings) as log:
        save_quality(run)
        write_json(run / "quality_report.json", {"onnx_difference": 0.0})
        log.evaluation("quality", 1, {"loss": 0.5, "pairwise": pairwise})
    return run


def register_quality(capsys: pytest.CaptureFixture[str], place: list[str], run: Path, pairwise: float) -> Path:
    """Push and register such a run."""
    quality_run(place, run, pairwise)
    said(capsys, "models", "push", "--run", str(run), *place)
    said(capsys, "models", "register", "quality", "--run", str(run), *place)
    return run


def test_the_quality_model(place: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = quality_run(place, tmp_path / "run", 0.85)
    assert "pushed quality v1" in said(capsys, "models", "push", "--run", str(run), *place)
    register = ["models", "register", "quality", "--run", str(run), *place]
    refused(said(capsys, *register, status=1), "quality/validation/pairwise", "goals.quality", "at least 0.9")
    assert "champion" in said(capsys, *register, "goals.quality=0.8")
    assert only(place, "quality")["sha256.store.quality.model.onnx"] == sha256(run / "quality.onnx")
    (tmp_path / "a=b.jpg").write_bytes(photo_jpeg())
    answer = json.loads(said(capsys, "models", "infer", "quality", "--which", "1", str(tmp_path / "a=b.jpg"), *place))
    assert answer["photo"] == "a=b.jpg" and 0 <= answer["score"] <= 1


def test_the_records_of_a_run_are_found_by_its_folder(
    place: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, elsewhere = quality_run(place, tmp_path / "run", 0.95), place[1:]
    said(capsys, "models", "push", "--run", str(run), *elsewhere)
    said(capsys, "models", "register", "quality", "--run", str(run), *elsewhere)
    assert only(place, "quality")["weights.quality"].endswith("/models/quality/v1")
    (run / "tracking.json").unlink()
    assert "has no record" in said(capsys, "models", "push", "--run", str(run), *place, status=2)
    assert [path.name for path in (tmp_path / "store" / "models" / "quality").iterdir()] == ["v1"], "nothing is pushed"


def test_data_of_a_run_without_a_table_of_its_photos(place: list[str], tmp_path: Path) -> None:
    write_json(tmp_path / "photos" / DATA_FILE, {"address": "lakefs://pills/0123/models/data/v1"})
    settings = load_settings(profile="cpu", data_root=tmp_path / "photos", overrides=place)
    with tracked(settings), open_run(tmp_path / "run", settings):
        pass
    tracking = open_tracking(settings)
    tags = tracking.client.get_run(run_of_folder(tracking, tmp_path / "run")).data.tags
    assert tags["data_version"] == "lakefs://pills/0123/models/data/v1"


def test_colours_are_judged_by_the_evaluation_whose_weights_were_kept(place: list[str], tmp_path: Path) -> None:
    settings = load_settings(profile="cpu", overrides=place)
    with tracked(settings), open_run(tmp_path / "run", settings) as log:
        for step, figure in ((1, 3.0), (2, 1.0), (3, 2.0)):
            log.evaluation("nilut", step, {"de76": figure})
            log.evaluation("quality", step, {"pairwise": figure})
    tracking = open_tracking(settings)
    found = tracking.client.get_run(run_of_folder(tracking, tmp_path / "run"))
    assert (figure_of(tracking, found, "nilut"), figure_of(tracking, found, "quality")) == (1.0, 2.0)
    assert figure_of(tracking, found, "lut3d") is None


def test_the_segmenter(place: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings, run = load_settings(profile="cpu", overrides=place), tmp_path / "run"
    with tracked(settings), open_run(run, settings):
        (run / "best_segmenter.pt").write_bytes(os.urandom(1000))
    (run / "export").mkdir()
    (run / "export" / "segmenter.onnx").write_bytes(os.urandom(1000))
    write_json(run / "export" / "export_report.json", {"passed": True, "networks": ["segmenter"]})
    said(capsys, "models", "push", "--run", str(run), *place)
    register = ["models", "register", "segmenter", "--run", str(run), *place]
    assert "has no figure test/outlines/miou" in said(capsys, *register, status=2)
    write_json(run / "evaluation.json", {"split": "test", "outlines": {"miou": 0.72, "pills": 20}})
    record_run(settings, run, open_tracking(settings))
    refused(said(capsys, *register, status=1), "test/outlines/miou", "goals.miou", "at least 0.9")
    assert "champion" in said(capsys, *register, "goals.miou=0.7")
    assert only(place, "segmenter")["missed"] == "none"


def test_a_person_registers_what_missed_its_goal_and_it_is_noted(
    place: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, run = load_settings(profile="cpu", overrides=place), quality_run(place, tmp_path / "run", 0.6)
    said(capsys, "models", "push", "--run", str(run), *place)
    monkeypatch.setattr("builtins.input", lambda question: "no number")
    manual = ["models", "register", "quality", "--manual", *place]
    assert "'no number' is no number of the table, 1 to 1: nothing was done" in said(capsys, *manual, status=2)
    assert not registered(open_tracking(settings), "quality")
    monkeypatch.setattr("builtins.input", lambda question: "1")
    said(capsys, *manual)
    tags = only(place, "quality")
    assert tags["registered"].startswith("by hand, by ") and "quality/validation/pairwise is 0.6" in tags["missed"]


def test_weights_that_are_others_or_gone_register_nothing(
    place: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, tracking = (
        quality_run(place, tmp_path / "run", 0.95),
        open_tracking(load_settings(overrides=place, profile="cpu")),
    )
    register = ["models", "register", "quality", "--run", str(run), *place]
    assert "No weights of a quality are recorded" in said(capsys, *register, status=2)
    trained = (run / "quality.onnx").read_bytes()
    (run / "quality.onnx").write_bytes(b"another network")
    said(capsys, "models", "push", "--run", str(run), *place)
    assert "is another file than the run has recorded" in said(capsys, *register, status=2)
    (run / "quality.onnx").write_bytes(trained)
    said(capsys, "models", "push", "--run", str(run), *place)
    model = tmp_path / "store" / "models" / "quality" / "v2" / "model.onnx"
    tags = tracking.client.get_run(run_of_folder(tracking, run)).data.tags
    assert fetch_checked(tags, "quality", tmp_path / "cache" / "models"), "a cache has them undamaged"
    right = model.read_bytes()
    model.write_bytes(right[:-1] + b"!")
    assert "is damaged, its hash is not the one that it was pushed with" in said(capsys, *register, status=2)
    model.unlink()
    assert "Pulling v2 of quality failed" in said(capsys, *register, status=2)
    model.write_bytes(right)
    run_id = json.loads((run / "tracking.json").read_text())["run_id"]
    tracking.client.set_tag(run_id, "sha256.store.quality.model.onnx", "0" * 64)
    assert "holds other files than those that were recorded" in said(capsys, *register, status=2)
    assert not registered(tracking, "quality")


def test_every_kind_of_model_has_a_figure() -> None:
    assert set(THRESHOLDS) == {"classifier", "detector", "segmenter", "quality", "nilut", "lut3d"}
