"""The service's benchmark from end to end at a tiny size, and its error handling."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import psutil
import pytest
from conftest import HEAD, goal_values

from pillsnap.answer.factory import load_identifier
from pillsnap.bench.errors import BenchError
from pillsnap.bench.report import is_met
from pillsnap.bench.serving import main as serve
from pillsnap.bench.serving import session
from pillsnap.bench.serving.limit import limit_of
from pillsnap.bench.serving.report import table
from pillsnap.bench.serving.server_process import Program
from pillsnap.config.load import load_settings
from pillsnap.export.report import export_run

ROOT = Path(__file__).parents[1]
SHORT = "--count 3 --megapixels 0.5 --clients 1 4 --requests 6 --rounds 2 --starts 1".split()
KEYS = {
    *HEAD,
    "goals",
    "servers",
    "errors",
    "memory_slope_mb_per_minute",
    "weights_mb",
    "memory",
    "starts",
    "ended",
    "soak",
    "ceiling",
    "not_measured",
    "rounds",
    "setup",
    "seconds",
}
# Responds to the first requests with 200, to two with 500, then the process ends.
DYING = """
import os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
photos = 0
class Handler(BaseHTTPRequestHandler):
    def respond(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.respond(200, b"ready")
    def do_POST(self):
        global photos
        photos += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        if photos > 8:
            print("no memory is left", flush=True)
            os._exit(3)
        self.respond(500 if photos > 6 else 200, b'{"pills": []}')
    def log_message(self, *words):
        pass
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def run(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("serve") / "run"
    shutil.copytree(trained_run, copy)
    assert export_run(copy, load_settings(copy / "config.yaml"))["passed"]
    return copy


@pytest.fixture(scope="module")
def report(run: Path) -> dict:
    """One run of everything, as `make bench-serve` starts it, with a peer that needs no installation."""
    out = run.parent / "out"
    command = [
        sys.executable,
        "-m",
        "pillsnap.bench.serving.main",
        "--run",
        str(run),
        "--out",
        str(out),
        *SHORT,
        "--peers",
        "fastapi",
        "--soak-minutes",
        "0.05",
        "--soak-clients",
        "2",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "p95 over limit 1 client" in done.stdout and "serve.json" in done.stdout
    assert [path.name for path in out.iterdir()] == ["serve.json"], "photos and logs stay behind"
    return json.loads((out / "serve.json").read_text(encoding="utf-8"))


def test_the_report_holds_everything(report: dict) -> None:
    assert set(report) == KEYS and report["not_measured"] == {} and report["ended"] == {}
    goals = goal_values(report)
    ratios = {
        "p95_over_limit_1_client",
        "throughput_over_limit_4_clients",
        "throughput_over_fastapi_4_clients",
    }
    assert set(goals) == {*ratios, "errors", "ready_seconds", "memory_mb_beyond_weights"}
    assert all(math.isfinite(goals[name]) and goals[name] > 0 for name in ratios)
    assert set(report["servers"]) == {"limit", "ours", "fastapi"}
    for name, counts in {**report["servers"], "ceiling": report["ceiling"]}.items():
        assert set(counts) == {"1", "4"}
        for found in counts.values():
            assert 0 < found["p50_ms"] <= found["p95_ms"] <= found["p99_ms"] and found["requests_per_second"] > 0, (
                name,
                found,
            )
            assert (
                found["answers"] == (6 if name == "ceiling" else 12)
                and found["errors"] == 0
                and found["problems"] == {}
            )
            assert (found["load_cpu_ms"] > 0) == (name != "limit")
    assert report["errors"] == {"ours": 0, "fastapi": 0, "soak": 0} and goal_values(report)["errors"] == 0
    assert (
        report["machine"]["cores"] >= 1
        and report["versions"]["uvicorn"]
        and report["versions"]["servers"]["fastapi"]["fastapi"]
    )


def test_every_server_identifies_the_drugs_of_the_limit(report: dict) -> None:
    assert [found["other_drug"] for name in ("ours", "fastapi") for found in report["servers"][name].values()] == [
        0,
        0,
        0,
        0,
    ]
    assert 2 <= report["setup"]["photos"]["engine_calls"] <= 3, (
        "one or two calls of the detector, one of the classifier"
    )


def test_start_memory_and_long_load_are_measured(report: dict, run: Path) -> None:
    assert len(report["starts"]) == 1 and goal_values(report)["ready_seconds"] == report["starts"][0] > 0.1
    assert (
        report["memory"]["ours"]["memory_mb"] > 50
        and report["memory"]["fastapi"]["ready_mb"] > 50
        and report["memory"]["ours"]["processes"] == 1
    )
    assert report["weights_mb"] == pytest.approx(
        sum((run / "export" / f"{task}.onnx").stat().st_size for task in ("classifier", "detector")) / 1e6, abs=0.1
    )
    soak = report["soak"]
    assert soak["answers"] > 2 and soak["errors"] == 0 and len(soak["memory_mb"]) >= 3 and soak["clients"] == 2
    assert report["memory_slope_mb_per_minute"] == soak["memory_slope_mb_per_minute"] is not None


def options(run: Path, out: Path, *more: str) -> Namespace:
    return serve.parse(["--run", str(run), "--out", str(out), *SHORT, *more])


def test_the_service_and_the_limit_correct_colours(run: Path, tmp_path: Path) -> None:
    words = ("--color", "gray_world", "--peers", "--soak-minutes", "0")
    report = serve.bench_serve(options(run, tmp_path / "out", *words))
    assert goal_values(report)["single_p95_over_limit"] > 0 and report["setup"]["color"] == "gray_world"
    assert 2 <= report["setup"]["photos"]["engine_calls"] <= 3, "the correction is no call of the engine"
    assert report["servers"]["ours"]["1"]["errors"] == report["servers"]["ours"]["1"]["other_drug"] == 0
    folder = session.with_color(run / "export", "gray_world", tmp_path / "models")
    assert load_identifier(folder).rules.color == "gray_world"
    assert load_identifier(run / "export").rules.color == "learned"


def test_errors_and_the_end_of_a_server_are_in_the_report(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        session, "our_program", lambda setup: Program("ours", (sys.executable, "-c", DYING, "{port}"), "/ready")
    )
    report = serve.bench_serve(options(run, tmp_path / "out", "--peers", "--soak-minutes", "0.05"))
    turns = report["servers"]["ours"]
    assert turns["1"]["problems"]["status 500"] == 2 and turns["4"]["answers"] == 0 and turns["4"]["p95_ms"] is None
    assert set(turns["1"]["problems"]) > {"status 500"} and turns["1"]["answers"] == 2
    assert turns["1"]["errors"] == 2 * (6 + 4) - 6, "all but the first six, those that aren't timed included"
    assert turns["4"]["errors"] == 2 * (6 + 4) and report["errors"] == {"ours": turns["1"]["errors"] + 20}
    goals = goal_values(report)
    assert goals["p95_over_limit_1_client"] is goals["throughput_over_limit_4_clients"] is None
    assert report["soak"] is None
    assert report["ended"]["ours"] == "ended by itself with status 3: no memory is left"
    met = {goal["name"]: is_met(goal) for goal in report["goals"]}
    assert met == {
        "p95_over_limit_1_client": False,
        "throughput_over_limit_4_clients": False,
        "errors": False,
        "ready_seconds": True,
        "memory_mb_beyond_weights": False,
    }
    assert "no memory is left" in table(report) and "missing  goal at least 0.95, not met" in table(report)


def test_a_peer_that_cannot_be_installed_is_reported_and_replaced(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(name: str, folder: Path) -> str:
        if name == "bentoml":
            raise BenchError("bentoml can't be installed: no network")
        return sys.executable

    monkeypatch.setattr(session, "peer_python", fails)
    (tmp_path / "work").mkdir()
    setup = session.prepare(options(run, tmp_path, "--peers", "bentoml"), tmp_path / "work")
    assert setup.missing == {"bentoml": "bentoml can't be installed: no network"} and set(setup.pythons) == {"fastapi"}
    assert set(session.programs_of(setup)) == {"ours", "fastapi"}
    settings = load_settings(tmp_path / "work" / "config.yaml")
    assert settings.serve.requests_per_minute == 0 and settings.serve.model_path == run / "export"


def test_an_impossible_run_ends_with_one_sentence(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        session,
        "our_program",
        lambda setup: Program("ours", (sys.executable, "-c", "raise SystemExit('the port is taken')"), "/ready"),
    )
    cases = {
        ("--run", str(tmp_path)): "has no export",
        ("--run", str(run), "--photos", str(tmp_path / "none")): "--photos: there is no folder",
        ("--run", str(run), "--clients", "4", "1"): "--clients is 4 1",
        ("--run", str(run), "--rounds", "0"): "--rounds is 0: give 1 or more",
        ("--run", str(run), *SHORT, "--peers"): "ours has ended with status 1 before it was ready: the port is taken",
    }
    for words, message in cases.items():
        assert serve.main([*words, "--out", str(tmp_path / "out")]) == 2
        errors = capsys.readouterr().err
        assert message in errors and "Traceback" not in errors
        assert not (tmp_path / "out" / "serve-work").exists() and not (tmp_path / "out" / "serve.json").exists()


def test_a_limit_without_models_raises_the_reason(tmp_path: Path) -> None:
    with (
        pytest.raises(BenchError, match="has ended with status 1: .*There is no classifier.onnx"),
        limit_of(tmp_path, [], 0, "onnxruntime", tmp_path / "limit.log"),
    ):
        pass


def test_no_server_stays_behind_when_it_is_ended_early(run: Path, tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "pillsnap.bench.serving.main",
        "--run",
        str(run),
        "--out",
        str(tmp_path / "out"),
        *SHORT,
        "--rounds",
        "1000",
        "--peers",
        "fastapi",
    ]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert any("round 1 of" in line for line in process.stdout)
        started = psutil.Process(process.pid).children(recursive=True)
        assert sum("uvicorn" in one.cmdline() for one in started) == 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert [one for one in started if one.is_running() and one.status() != psutil.STATUS_ZOMBIE] == []
    assert list((tmp_path / "out").iterdir()) == []
