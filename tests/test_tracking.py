"""Runs recorded in MLflow while they train: what is there, what is missing where a server is away, and bad input."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pillsnap.atomic import sha256
from pillsnap.cli import main
from pillsnap.config.load import load_settings, save_settings
from pillsnap.config.schema import Settings
from pillsnap.registry import follow, records
from pillsnap.registry.tracking import Tracking, TrackingError, open_tracking
from pillsnap.runlog import LISTENERS, open_run

TIMES: dict[str, Any] = {"lr": 1e-3, "data_time": 0.01, "compute_time": 0.03, "images": 16, "cuda_mem": 0.0}


def settings_with(url: str, *more: str) -> Settings:
    return load_settings(profile="cpu", overrides=[url, "train.log_every=1", *more])


def short_run(settings: Settings, folder: Path, steps: int = 3) -> Path:
    """A run folder with a few steps."""
    with open_run(folder, settings) as run:
        for step in range(1, steps + 1):
            run.step("classifier", step, steps=steps, epoch=0, loss=4.0 / step, **TIMES)
    return folder


def losses(tracking: Tracking, run_id: str, name: str = "classifier/loss") -> dict[int, float]:
    """Steps and values of a metric."""
    history = tracking.client.get_metric_history(run_id, name)
    assert len({metric.step for metric in history}) == len(history), "no step is there twice"
    return {metric.step: metric.value for metric in history}


def test_a_training_is_recorded(tiny_settings: Callable[..., Settings], url: str, tmp_path: Path, tiny_data: Path):
    settings = tiny_settings(url, "train.only=classifier")
    save_settings(settings, tmp_path / "config.yaml")
    assert main(["train", "--cfg", str(tmp_path / "config.yaml"), "--run-dir", str(tmp_path / "run")]) == 0
    tracking = open_tracking(settings)
    (found,) = tracking.client.search_runs([tracking.experiment])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert steps and losses(tracking, found.info.run_id) == steps
    checks = {row["step"]: row["validation"]["macro_f1"] for row in rows if "validation" in row}
    assert losses(tracking, found.info.run_id, "classifier/validation/macro_f1") == checks
    tags, params = found.data.tags, found.data.params
    assert tags["sha256.best_classifier.pt"] == sha256(tmp_path / "run" / "best_classifier.pt")
    assert params["train.only"] == "classifier" and params["paths.data_root"] == str(tiny_data)
    decisions = json.loads((tmp_path / "run" / "decisions.json").read_text())
    assert tags["git_revision"] == next(item["choice"] for item in decisions if item["what"] == "code")
    assert tags["data_version"] == f"sha256:{tags['data_sha256']}" and len(tags["data_sha256"]) == 64
    assert tags["class_map_hash"] and found.info.status == "FINISHED"
    files = {file.path for file in tracking.client.list_artifacts(found.info.run_id)}
    assert {"config.yaml", "metrics.jsonl", "data_report.json", "plots"} <= files and "best_classifier.pt" not in files
    assert main(["evaluate", "--run", str(tmp_path / "run")]) == 0
    top1 = json.loads((tmp_path / "run" / "evaluation.json").read_text())["single"]["top1"]
    assert tracking.client.get_run(found.info.run_id).data.metrics["test/single/top1"] == top1


def test_resumed_runs_go_on_and_new_ones_begin_anew(url: str, tmp_path: Path):
    settings, resumed = settings_with(url), settings_with(url, "train.resume=last")
    with follow.tracked(settings):
        short_run(settings, tmp_path / "run", 3)
    with follow.tracked(resumed):
        short_run(resumed, tmp_path / "run", 5)
    tracking = open_tracking(settings)
    (found,) = tracking.client.search_runs([tracking.experiment])
    assert sorted(losses(tracking, found.info.run_id)) == [1, 2, 3, 4, 5]
    with follow.tracked(settings):
        short_run(settings, tmp_path / "run", 1)
    assert len(tracking.client.search_runs([tracking.experiment])) == 2


def test_what_is_sent_survives_a_kill(url: str, tmp_path: Path):
    """A killed training leaves a record without an end; resuming completes it."""
    code = f"""
import json, os, signal, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_tracking import TIMES, follow, open_run, open_tracking, settings_with
settings = settings_with({url!r})
client = open_tracking(settings).client
with follow.tracked(settings, seconds=0.05), open_run(Path({str(tmp_path / "run")!r}), settings) as run:
    for step in (1, 2):
        run.step("classifier", step, steps=4, epoch=0, loss=1.0, **TIMES)
    run_id = json.loads((run.folder / "tracking.json").read_text())["run_id"]
    while len(client.get_metric_history(run_id, "classifier/loss")) < 2:
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    settings = settings_with(url, "train.resume=last")
    tracking = open_tracking(settings)
    (found,) = tracking.client.search_runs([tracking.experiment])
    assert found.info.status == "RUNNING" and set(losses(tracking, found.info.run_id)) == {1, 2}
    assert found.data.params["train.log_every"] == "1" and found.data.tags["git_revision"] not in ("", "unknown")
    with follow.tracked(settings):
        short_run(settings, tmp_path / "run", 4)
    assert sorted(losses(tracking, found.info.run_id)) == [1, 2, 3, 4]
    assert tracking.client.get_run(found.info.run_id).info.status == "FINISHED"


def test_a_run_that_has_failed_stays_one(url: str, tmp_path: Path):
    settings = settings_with(url)
    with pytest.raises(RuntimeError), follow.tracked(settings), open_run(tmp_path / "run", settings):
        raise RuntimeError("out of patience")
    follow.record_results(settings, tmp_path / "run")
    tracking = open_tracking(settings)
    (found,) = tracking.client.search_runs([tracking.experiment])
    assert found.info.status == "FAILED"


def test_a_server_that_goes_away_ends_no_training(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    settings = settings_with(url)
    with (
        caplog.at_level(logging.WARNING, "pillsnap"),
        follow.tracked(settings, seconds=0.01),
        monkeypatch.context() as m,
    ):

        def away(*arguments: object, **keywords: object) -> None:
            raise MlflowException("API request failed: Connection refused")

        m.setattr(MlflowClient, "log_batch", away)
        short_run(settings, tmp_path / "run")
    assert "Connection refused" in caplog.text and "models track --run" in caplog.text
    decisions = json.loads((tmp_path / "run" / "decisions.json").read_text())
    assert [item["choice"] for item in decisions if item["fallback"]] == ["not complete"]
    assert main(["models", "track", "--run", str(tmp_path / "run")]) == 0
    tracking = open_tracking(settings)
    (found,) = tracking.client.search_runs([tracking.experiment])
    assert losses(tracking, found.info.run_id) == {1: 4.0, 2: 2.0, 3: pytest.approx(4 / 3)}
    assert found.info.status == "FINISHED"


@pytest.mark.parametrize(
    "url, sentence",
    [
        ("mlruns", "tracking.url is 'mlruns', but must be null, sqlite"),
        ("file:///runs", "must be null, sqlite"),
        ("http://me:secret@host", "MLFLOW_TRACKING_USERNAME"),
        ("http://127.0.0.1:9", "Opening the records of runs failed at http://127.0.0.1:9 (Connection refused)"),
        ("sqlite:////proc/none/mlflow.db", "Opening the records of runs failed at sqlite:////proc/none/mlflow.db"),
    ],
)
def test_a_wrong_place_ends_the_command_before_it_trains(
    url: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["train", "--run-dir", str(tmp_path / "run"), f"tracking.url={url}"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pillsnap: ")]
    assert sentence in line and len(line) < 500
    assert not (tmp_path / "run").exists() and not LISTENERS


def test_a_damaged_file_is_one_sentence(tmp_path: Path):
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 1000)
    with pytest.raises(TrackingError, match="Opening the records of runs failed at sqlite") as caught:
        open_tracking(settings_with(f"tracking.url=sqlite:///{tmp_path / 'mlflow.db'}"))
    assert "\n" not in str(caught.value)


def test_only_the_first_of_several_processes_is_recorded(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "1")
    with follow.tracked(settings_with(url)):
        assert not LISTENERS


def test_without_a_place_nothing_is_imported(tmp_path: Path):
    code = f"""
import sys
from pathlib import Path
from pillsnap.config.load import load_settings, save_settings
from pillsnap.registry.follow import tracked
from pillsnap.runlog import open_run
settings = load_settings(profile="cpu")
with tracked(settings), open_run(Path({str(tmp_path / "run")!r}), settings):
    pass
assert not [name for name in sys.modules if name.split(".")[0] in ("mlflow", "sqlalchemy", "lakefs")], "imported"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not (tmp_path / "run" / records.RECORD_FILE).exists()


def test_nothing_is_reported_to_the_makers(url: str):
    open_tracking(settings_with(url))
    from mlflow.telemetry.utils import is_telemetry_disabled

    assert is_telemetry_disabled()
