"""The deployment gate passes a good run, and rejects one that misses any limit or can't be measured."""

from __future__ import annotations

import json
import re
import shutil
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from pillsnap import cli
from pillsnap.config.load import load_settings
from pillsnap.evaluation import gate
from pillsnap.evaluation.evaluate import evaluate_run
from pillsnap.export.report import export_run

GENEROUS = [
    "goals.top1=0",
    "goals.map50=0",
    "goals.latency_ms_p95=60000",
    "gate.memory_mb=20000",
    "latency.warmup_runs=1",
    "latency.runs=4",
    "gate.reproducibility_images=6",
    "serve.threads=1",
]
FAST = ["gate.reproducibility=false", "latency.runs=1"]
CHECKS = [
    "size of the classifier",
    "size of the detector",
    "comparison",
    "single top-1",
    "combo mAP@0.5",
    "latency p95",
    "memory",
    "difference of two evaluations",
]


@pytest.fixture(scope="module")
def finished(trained_run: Path) -> Path:
    settings = load_settings(trained_run / "config.yaml", ["latency.warmup_runs=0", "latency.runs=1"])
    evaluate_run(trained_run, settings)
    export_run(trained_run, settings)
    return trained_run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(
        finished, tmp_path / "run", ignore=shutil.ignore_patterns("tensorboard", "last.pt", "previous.pt")
    )


def run_gate(run: Path, out: Path, capsys: pytest.CaptureFixture, *settings: str) -> tuple[int, list[str], dict]:
    """Status, the sentences on the error stream, and the newest report."""
    capsys.readouterr()
    latest = {text.partition("=")[0]: text for text in settings}
    status = cli.main(["gate", "--run", str(run), "--out", str(out), *latest.values()])
    captured = capsys.readouterr()
    reports = sorted(out.glob("*.json"))
    report = json.loads(reports[-1].read_text(encoding="utf-8")) if reports else {}
    assert not reports or (str(reports[-1]) in captured.out and all(name in captured.out for name in CHECKS[:7]))
    return (
        status,
        [line for line in captured.err.splitlines() if line.startswith(("Not to be deployed: ", "pillsnap: "))],
        report,
    )


def test_good_run_passes_with_a_full_report(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    status, sentences, report = run_gate(finished, tmp_path / "reports", capsys, *GENEROUS)
    assert (status, sentences) == (0, []) and report["passed"] and report["failures"] == []
    assert [check["name"] for check in report["checks"]] == CHECKS and all(
        check["passed"] for check in report["checks"]
    )
    values = {check["name"]: check["figure"] for check in report["checks"]}
    assert values["size of the classifier"] == (finished / "export" / "classifier.onnx").stat().st_size / 1e6
    evaluation = json.loads((finished / "evaluation.json").read_text(encoding="utf-8"))
    assert (
        values["single top-1"] == evaluation["single"]["top1"]
        and values["combo mAP@0.5"] == evaluation["combo"]["map50"]
    )
    assert (
        values["latency p95"] > 0
        and values["memory"] > 20
        and values["difference of two evaluations"] == 0
        and values["comparison"] is True
    )
    assert {check["key"]: check["limit"] for check in report["checks"]}["gate.memory_mb"] == 20000
    assert (
        report["machine"]["cores"] >= 1
        and report["versions"]["onnxruntime-gpu"]
        and report["seconds"] > 0
        and report["engine"] == "onnxruntime"
        and report["evaluated_on"] == evaluation["split"]
    )
    (name,) = (path.name for path in (tmp_path / "reports").iterdir())
    assert re.fullmatch(r"benchmark_\d{8}_\d{6}\.json", name)
    assert abs(datetime.strptime(name, "benchmark_%Y%m%d_%H%M%S.json") - datetime.now()) < timedelta(minutes=10)


@pytest.mark.parametrize(
    "setting, words",
    [
        (
            "gate.classifier_mb=0.001",
            r"size of the classifier is [\d.]+ MB, but gate.classifier_mb asks for at most 0.001 MB",
        ),
        (
            "gate.detector_mb=0.001",
            r"size of the detector is [\d.]+ MB, but gate.detector_mb asks for at most 0.001 MB",
        ),
        ("goals.top1=1", r"single top-1 is 0\.5, but goals.top1 asks for at least 1\."),
        ("goals.map50=1", r"combo mAP@0.5 is 0\.5, but goals.map50 asks for at least 1\."),
        ("goals.latency_ms_p95=0.001", r"latency p95 is [\d.]+ ms, but goals.latency_ms_p95 asks for at most 0.001 ms"),
        ("gate.memory_mb=1", r"memory is [\d.]+ MB, but gate.memory_mb asks for at most 1 MB"),
    ],
)
def test_each_missed_limit_fails_alone(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, setting: str, words: str
):
    evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    evaluation["single"]["top1"] = evaluation["combo"]["map50"] = (
        0.5  # a tiny network may happen to be right every time
    )
    (run / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
    status, sentences, report = run_gate(run, tmp_path / "reports", capsys, *GENEROUS, *FAST, setting)
    assert status == 1 and len(sentences) == 1 and re.search(words, sentences[0]), sentences
    assert [check["key"] for check in report["checks"] if not check["passed"]] == [
        setting.partition("=")[0]
    ] and not report["passed"]
    assert [check["name"] for check in report["checks"]] == CHECKS[:7], "reproducibility is off"


def test_predictions_that_vary_fail(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    measured = iter(({"top1": 0.75}, {"top1": 0.5}))
    monkeypatch.setattr(gate, "_metrics", lambda *_: next(measured))
    status, sentences, _ = run_gate(finished, tmp_path / "reports", capsys, *GENEROUS)
    assert status == 1 and sentences == [
        "Not to be deployed: difference of two evaluations is 0.25, but gate.reproducibility asks for at most 0."
    ]


def test_missing_or_outdated_evaluation_fails(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    (run / "evaluation.json").unlink()
    status, sentences, report = run_gate(run, tmp_path / "reports", capsys, *GENEROUS, *FAST)
    assert (
        status == 1
        and len(sentences) == 2
        and all(
            "could not be measured" in sentence and f"`pillsnap evaluate --run {run}`" in sentence
            for sentence in sentences
        )
    )
    assert [check["figure"] for check in report["checks"] if not check["passed"]] == [None, None]
    (run / "evaluation.json").write_text(
        json.dumps({**evaluation, "steps": {"classifier": 1, "detector": 1}}), encoding="utf-8"
    )
    status, sentences, _ = run_gate(run, tmp_path / "reports", capsys, *GENEROUS, *FAST)
    assert (
        status == 1
        and all("went on after its evaluation" in sentence for sentence in sentences)
        and len(sentences) == 2
    )
    (run / "evaluation.json").write_text(
        json.dumps({"split": "test", "single": evaluation["single"]}), encoding="utf-8"
    )
    status, sentences, _ = run_gate(run, tmp_path / "reports", capsys, *GENEROUS, *FAST)
    assert status == 1 and len(sentences) == 1 and "has no map50" in sentences[0]


def test_changed_file_fails(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    path = run / "export" / "classifier.onnx"
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    status, sentences, _ = run_gate(run, tmp_path / "reports", capsys, *GENEROUS, *FAST)
    assert (
        status == 1
        and "classifier.onnx is not the file that was compared: its SHA-256 is" in sentences[0]
        and f"`pillsnap export --run {run}`" in sentences[0]
    )
    path.write_bytes(whole[:1000])
    report = run / "export" / "export_report.json"
    content = json.loads(report.read_text(encoding="utf-8"))
    for task in ("classifier", "detector"):
        del content["formats"]["onnx"][task]["sha256"]
    report.write_text(json.dumps(content), encoding="utf-8")
    status, sentences, _ = run_gate(run, tmp_path / "reports", capsys, *GENEROUS)
    assert status == 1 and "it has 1,000 bytes, the compared one has" in sentences[0]
    assert ["could not be measured" in sentence for sentence in sentences] == [False, True, True, True], sentences


def test_weights_that_were_not_exported_fail(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (run / "best.pt").write_bytes(b"one epoch more")
    status, sentences, _ = run_gate(run, tmp_path / "reports", capsys, *GENEROUS, *FAST)
    assert status == 1 and len(sentences) == 1 and "best.pt is not what was exported" in sentences[0]


def test_failed_comparison_fails(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    report = run / "export" / "export_report.json"
    content = json.loads(report.read_text(encoding="utf-8"))
    content["formats"]["onnx"] |= {
        "passed": False,
        "classifier": {**content["formats"]["onnx"]["classifier"], "failures": ["its top-1 falls"]},
    }
    report.write_text(json.dumps(content), encoding="utf-8")
    status, sentences, _ = run_gate(run, tmp_path / "reports", capsys, *GENEROUS, *FAST)
    assert (
        status == 1
        and len(sentences) == 1
        and "the format onnx has failed its comparison: its top-1 falls" in sentences[0]
    )


def test_errors_end_with_status_2_and_no_report(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "reports"
    assert run_gate(tmp_path / "nowhere", out, capsys)[:2] == (
        2,
        [f"pillsnap: there is no run in {tmp_path / 'nowhere'}: name with --run the folder that training has printed"],
    )
    status, sentences, report = run_gate(run, out, capsys, "serve.engine=openvino-int8")
    assert status == 2 and "openvino-int8 was requested" in sentences[0] and not report
    (run / "export" / "export_report.json").write_text("{", encoding="utf-8")
    assert "is damaged" in run_gate(run, out, capsys)[1][0]
    shutil.rmtree(run / "export")
    status, sentences, _ = run_gate(run, out, capsys)
    assert status == 2 and len(sentences) == 1 and f"`pillsnap export --run {run}`" in sentences[0] and not out.exists()
    out.write_text("a file", encoding="utf-8")
    assert cli.main(["gate", "--run", str(run), "--out", str(out)]) == 2 and out.read_text(encoding="utf-8") == "a file"


def test_reports_are_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    moments = iter([datetime(2030, 1, 1, 12, 0, 0)] * 3 + [datetime(2030, 1, 1, 12, 0, 1)])

    class Clock(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:
            return next(moments)

    monkeypatch.setattr(gate, "datetime", Clock)
    files = [gate.write_new(tmp_path, {"number": number}) for number in range(2)]
    assert [file.name for file in files] == ["benchmark_20300101_120000.json", "benchmark_20300101_120001.json"]
    assert [json.loads(file.read_text(encoding="utf-8"))["number"] for file in files] == [0, 1]
    monkeypatch.undo()
    with pytest.raises(TypeError):
        gate.write_new(tmp_path, {"number": object()})
    assert sorted(path.name for path in tmp_path.iterdir()) == [file.name for file in files], (
        "a name without a report stays behind"
    )
