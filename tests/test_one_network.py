"""A classifier alone and a detector alone: trained, evaluated, exported, gated and served without the other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from test_gate import GENEROUS

from pillsnap import cli
from pillsnap.answer.factory import load_identifier
from pillsnap.config.load import load_settings
from pillsnap.config.schema import Settings
from pillsnap.data.manifest import load_dataset
from pillsnap.data.reading.photo_files import decode_photo
from pillsnap.evaluation.evaluate import evaluate_run, held_out, identifier_of
from pillsnap.export.report import export_run
from pillsnap.packaging.shipped import ShipError, exported_files
from pillsnap.registry.release import exported_networks
from pillsnap.training.checkpoint import CheckpointError
from pillsnap.training.run import train
from pillsnap.training.trained import best_file, load_trained


@pytest.fixture(scope="module", params=["classifier", "detector"])
def alone(
    request: pytest.FixtureRequest, tiny_settings: Callable[..., Settings], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """Name of a network, and a run that trained, evaluated and exported it alone."""
    run = train(
        tiny_settings("train.amp=off", f"train.only={request.param}"), tmp_path_factory.mktemp("alone") / request.param
    )
    settings = load_settings(run / "config.yaml", ["latency.warmup_runs=0", "latency.runs=1"])
    evaluate_run(run, settings)
    assert export_run(run, settings)["passed"]
    return request.param, run


def test_a_network_alone_is_measured_by_what_it_does(alone: tuple[str, Path]):
    name, run = alone
    report = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    assert ("single" in report, "combo" in report) == (name == "classifier", name == "detector")
    if name == "classifier":
        assert report["single"]["without_box"] == report["single"]["images"], "the whole photo is one pill"
    else:
        assert {"map50", "precision", "recall", "pills"} <= report["combo"].keys()
        assert "end_to_end_top1" not in report["combo"]


def test_a_network_alone_is_exported_and_passes_the_gate(
    alone: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    name, run = alone
    files = sorted(path.name for path in (run / "export").iterdir())
    assert files == sorted([f"{name}.onnx", "export_report.json"])
    assert best_file(run).name == f"best_{name}.pt" and exported_networks(run) == [name]
    capsys.readouterr()
    assert cli.main(["gate", "--run", str(run), "--out", str(tmp_path), *GENEROUS]) == 0, capsys.readouterr().err
    (path,) = tmp_path.glob("*.json")
    checks = [check["name"] for check in json.loads(path.read_text(encoding="utf-8"))["checks"]]
    assert f"size of the {name}" in checks and "comparison" in checks
    assert ("single top-1" in checks, "combo mAP@0.5" in checks) == (name == "classifier", name == "detector")
    assert ("latency p95" in checks) == (name == "classifier")
    copy = shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("tensorboard"))
    file = copy / "export" / f"{name}.onnx"
    file.write_bytes(file.read_bytes() + b"\n")
    assert cli.main(["gate", "--run", str(copy), "--out", str(tmp_path), *GENEROUS]) == 1
    assert f"{name}.onnx is not the file that was compared" in capsys.readouterr().err


def test_a_network_alone_answers_what_it_can(alone: tuple[str, Path]):
    name, run = alone
    photo = decode_photo(held_out(load_dataset(run))[1][0].image).pixels
    if name == "classifier":
        trained, served = identifier_of(load_trained(run)), load_identifier(run / "export")
        assert served.rules.detector_size is None
        assert served.identify(photo, "single").pills[0].code == trained.identify(photo, "single").pills[0].code
    else:
        with pytest.raises(CheckpointError, match="finds pills and can't name them"):
            identifier_of(load_trained(run)).identify(photo, "single")


def test_a_package_of_one_network_is_refused_with_what_to_do(alone: tuple[str, Path]):
    name, run = alone
    other = {"classifier": "detector", "detector": "classifier"}[name]
    with pytest.raises(ShipError, match=f"has no {other}, and a package holds both networks"):
        exported_files(run, ["onnx"])


def test_a_run_of_one_network_gets_the_other_later(
    alone: tuple[str, Path], tiny_settings: Callable[..., Settings], tmp_path: Path
):
    name, run = alone
    other = {"classifier": "detector", "detector": "classifier"}[name]
    both = train(tiny_settings("train.amp=off", f"train.only={other}", f"train.start_from={run}"), tmp_path / "both")
    assert load_trained(both).networks().keys() == {"classifier", "detector"}
    assert load_trained(both).rules.detector_size is not None
