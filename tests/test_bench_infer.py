"""Engines are measured with the files of a run, the choice is written beside them, and serving uses it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import HEAD, goal_values

from pillsnap import cli
from pillsnap.answer.factory import load_identifier
from pillsnap.bench.engines.infer import bench_run, table
from pillsnap.config.load import load_settings
from pillsnap.export.report import export_run
from pillsnap.runtime.engines import ENGINE_FILE, ENGINES, this_machine

MEASURED = ("torch-eager", "onnxruntime", "openvino")


@pytest.fixture(scope="module")
def run(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run, since a measurement writes to it."""
    copy = tmp_path_factory.mktemp("bench") / "run"
    shutil.copytree(trained_run, copy)
    assert export_run(copy, load_settings(copy / "config.yaml"))["passed"]
    return copy


@pytest.fixture(scope="module")
def report(run: Path) -> dict:
    settings = load_settings(run / "config.yaml", ["latency.runs=6", "latency.warmup_runs=1"])
    return bench_run(run, settings, run.parent / "out", [*MEASURED, "onnxruntime-int8", "onnxruntime-cuda"])


def test_report_has_all_timings(report: dict, run: Path):
    assert json.loads((run.parent / "out" / "infer.json").read_text()) == json.loads(json.dumps(report))
    assert set(report["engines"]) >= set(MEASURED)
    for name in MEASURED:
        timings = report["engines"][name]
        assert 0 < timings["p50_ms"] <= timings["p95_ms"] <= timings["p99_ms"] and timings["passes_comparison"], (
            name,
            timings,
        )
        assert (
            set(timings["images_per_second"]) == {"1", "2", "4", "8", "16", "32"}
            and min(timings["images_per_second"].values()) > 0
        )
        assert timings["start_seconds"] > 0.1 and timings["memory_mb"] > 50
        assert all(value > 0 for value in timings["steps_ms"].values())
    assert report["engines"]["torch-eager"]["memory_mb"] > report["engines"]["onnxruntime"]["memory_mb"], (
        "serving does not load torch"
    )
    goals = goal_values(report)
    assert set(report) >= HEAD
    assert set(goals) >= {"latency_ms_p95", "identify_over_engine_and_decode", "default_over_torch_eager"}
    latency = next(goal for goal in report["goals"] if goal["name"] == "latency_ms_p95")
    assert latency["n"] == 6 and latency["spread"] <= report["engines"][report["default_engine"]]["p99_ms"], "in ms"
    assert min(goals.values()) > 0 and goals["latency_ms_p95"] == report["engines"][report["default_engine"]]["p95_ms"]
    assert "classifier.int8.onnx" in report["not_measured"]["onnxruntime-int8"]
    assert report["default_engine"] in ("onnxruntime", "openvino") and report["default_engine"] in table(report)


def test_serving_uses_the_measured_choice(report: dict, run: Path):
    choice = json.loads((run / "export" / ENGINE_FILE).read_text())
    assert choice["engine"] == report["default_engine"] and choice["machine"] == this_machine()
    (run / "export" / ENGINE_FILE).write_text(json.dumps({**choice, "engine": "openvino"}))
    assert load_identifier(run / "export").classify.providers == ["OpenVINO CPU"]
    assert load_identifier(run / "export", engine="onnxruntime").classify.providers == ["CPUExecutionProvider"]


def test_failed_engine_falls_back_with_a_warning(
    report: dict, run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    from dataclasses import replace

    from pillsnap.runtime.session import ModelError

    def fail(path: Path, threads: int):
        raise ModelError("no such instruction")

    (run / "export" / ENGINE_FILE).write_text(json.dumps({"engine": "openvino", "machine": this_machine()}))
    monkeypatch.setitem(ENGINES, "openvino", replace(ENGINES["openvino"], open=fail))
    with caplog.at_level("WARNING", logger="pillsnap"):
        assert load_identifier(run / "export").classify.providers == ["CPUExecutionProvider"]
    assert "no such instruction" in caplog.text
    with pytest.raises(ModelError, match="no such instruction"):
        load_identifier(run / "export", engine="openvino")


def test_errors_are_one_sentence(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    shutil.copytree(run, tmp_path / "bare", ignore=shutil.ignore_patterns("export"))
    for arguments, message in {
        ("--run", str(tmp_path / "bare")): "has no export that has passed",
        ("--run", str(run), "--engines", "onnxruntime,telepathy"): "There is no engine 'telepathy'",
        ("--run", str(tmp_path / "nothing")): "there is no run in",
    }.items():
        assert cli.main(["bench", *arguments, "--out", str(tmp_path / "out")]) == 2
        errors = capsys.readouterr().err
        assert message in errors and "Traceback" not in errors
    assert not (tmp_path / "out").exists()
