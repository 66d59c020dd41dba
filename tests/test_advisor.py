"""The advisor on synthetic runs: each fault gives its code, and a healthy run gives none."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from test_runs import make_run

from pillsnap import cli
from pillsnap.config.load import load_settings
from pillsnap.config.schema import Settings
from pillsnap.evaluation.advisor import advise
from pillsnap.evaluation.evaluate import evaluate_run
from pillsnap.runlog import FAILED
from pillsnap.runs import RunError
from pillsnap.training import run as training_run
from pillsnap.training.report import diagnostics
from pillsnap.training.schedule import TrainingError

EVALUATION = {
    "split": "test",
    "single": {"top1": 0.9},
    "combo": {"map50": 0.8},
    "coverage": {"classes": 50, "tested": 50, "recognised": 49},
    "latency": {"p50": 20.0, "p95": 30.0, "runs": 50, "how": "torch"},
    "steps": {"classifier": 100, "detector": 100},
}


def settings(*overrides: str) -> Settings:
    return load_settings(
        profile="cpu", stage=2, overrides=["train.classifier.batch_size=16", "train.classifier.lr=0.001", *overrides]
    )


def healthy(folder: Path, tasks: tuple[str, ...] = ("classifier", "detector"), **evaluation: object) -> Path:
    """A finished run that has reached the goals of stage 2."""
    make_run(folder, tasks=tasks, steps=100)
    steps = dict.fromkeys(tasks, 100)
    (folder / "evaluation.json").write_text(json.dumps({**EVALUATION, "steps": steps, **evaluation}))
    change(
        folder,
        lambda row: (
            row.update(validation={name: min(1.0, value / 2) for name, value in row["validation"].items()})
            if "validation" in row
            else row.update(data_time=0.05)
        ),
    )
    return folder


def change(folder: Path, edit: Callable[[dict], object]) -> None:
    """Edit each row of metrics.jsonl."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        edit(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def add(folder: Path, **row: object) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def found(report: dict) -> dict[str, dict]:
    return {reason["code"]: reason for reason in report["reasons"]}


def test_healthy_run_proceeds_without_reasons(tmp_path: Path):
    report = advise(healthy(tmp_path / "run"), settings())
    assert report["reasons"] == [] and report["recommendation"] == "proceed" and report["measured_on"] == "test"
    assert report["facts"]["figures"] == {"classifier": 0.9, "detector": 0.8}
    assert json.loads((tmp_path / "run" / "reports" / "stage_2_evaluation.json").read_text()) == report


@pytest.mark.parametrize(
    "evaluation, code, measured, goal",
    [
        ({"single": {"top1": 0.55}}, "ACCURACY_BELOW_GOAL", 0.55, 0.6),
        ({"combo": {"map50": 0.45}}, "MAP_BELOW_GOAL", 0.45, 0.5),
        ({"combo": None, "all_photos": {"map50": 0.45}}, "MAP_BELOW_GOAL", 0.45, 0.5),
        ({"latency": {"p50": 90.0, "p95": 190.0, "runs": 50}}, "LATENCY_ABOVE_GOAL", 190.0, 150.0),
        ({"coverage": {"classes": 50, "tested": 40, "recognised": 40}}, "COVERAGE_LOW", 0.8, 0.95),
    ],
)
def test_missed_goal_recommends_tuning(evaluation: dict, code: str, measured: float, goal: float, tmp_path: Path):
    report = advise(healthy(tmp_path / "run", **evaluation), settings())
    assert list(found(report)) == [code] and report["recommendation"] == "tune"
    assert (found(report)[code]["measured"], found(report)[code]["goal"], found(report)[code]["weight"]) == (
        measured,
        goal,
        "goal",
    )


@pytest.mark.parametrize(
    "evaluation, code",
    [
        ({"latency": None}, "LATENCY_UNKNOWN"),
        ({"combo": None}, "NOT_MEASURED"),
        ({"coverage": {"classes": 50, "tested": 50, "recognised": 30}}, "CLASSES_NOT_RECOGNISED"),
    ],
)
def test_unknown_metrics_are_hints(evaluation: dict, code: str, tmp_path: Path):
    report = advise(healthy(tmp_path / "run", **evaluation), settings())
    assert list(found(report)) == [code] and report["recommendation"] == "proceed"


@pytest.mark.parametrize(
    "action, to, suggested",
    [("empty_cache", None, 8), ("half precision", None, 8), ("grad_accum", 2, 8), ("batch_size", 4, 4)],
)
def test_out_of_memory_suggests_half_the_batch(action: str, to: object, suggested: int, tmp_path: Path):
    folder = healthy(tmp_path / "run")
    add(folder, task="classifier", step=50, oom={"action": "empty_cache", "to": None, "reason": "it did not fit"})
    add(folder, task="classifier", step=50, oom={"action": action, "to": to, "reason": "it did not fit"})
    report = advise(folder, settings())
    assert (
        found(report)["OOM_HAPPENED"]["suggestion"] == {"train.classifier.batch_size": suggested}
        and found(report)["OOM_HAPPENED"]["measured"] == 2
    )
    assert (
        report["recommendation"] == "proceed" and report["facts"]["tasks"]["classifier"]["last_oom"]["action"] == action
    )


def test_suggested_batch_is_one_that_fitted(tmp_path: Path):
    folder = healthy(tmp_path / "run")
    for action, to in (("grad_accum", 4), ("batch_size", 8)):
        add(folder, task="classifier", step=50, oom={"action": action, "to": to, "reason": "it did not fit"})
    assert found(advise(folder, settings()))["OOM_HAPPENED"]["suggestion"] == {"train.classifier.batch_size": 2}, (
        "8 images of a step in 4 minibatches"
    )


def test_run_without_memory_or_with_nan_loss_recommends_stop(tmp_path: Path):
    short = healthy(tmp_path / "short")
    add(short, task="detector", step=100, oom={"action": "give up", "to": None, "reason": "one image does not fit"})
    assert advise(short, settings())["recommendation"] == "stop" and "OUT_OF_MEMORY" in found(advise(short, settings()))
    lost = healthy(tmp_path / "lost")
    add(lost, task="classifier", step=101, loss=None, lr=0.001, data_time=0.1, compute_time=0.1)
    (lost / "run.log").write_text(
        f"2026-01-02 03:04:05,678 ERROR   {FAILED}TrainingError: The classifier loss is nan.\n"
    )
    report = advise(lost, settings())
    assert report["recommendation"] == "stop" and report["measured_on"] == "validation", (
        "the evaluation is of an earlier step"
    )
    assert found(report)["LOSS_NOT_FINITE"]["suggestion"] == {"train.classifier.lr": 0.0001}
    assert {"EVALUATION_OUTDATED", "RUN_STOPPED"} <= set(found(report))


def test_plateau_overfitting_and_falling_validation(tmp_path: Path):
    flat = healthy(tmp_path / "flat", single={"top1": 0.3})
    change(flat, lambda row: row.update(loss=2.0) if "loss" in row else None)
    report = advise(flat, settings())
    assert (
        found(report)["LOSS_PLATEAU"]["suggestion"] == {"train.classifier.lr": 0.0001}
        and len([reason for reason in report["reasons"] if reason["code"] == "LOSS_PLATEAU"]) == 1
    )
    falling = healthy(tmp_path / "falling")
    change(
        falling,
        lambda row: (
            row.update(validation={"top1": 0.9, "macro_f1": 0.9 - row["step"] / 500})
            if "validation" in row and row["task"] == "classifier"
            else None
        ),
    )
    assert found(advise(falling, settings()))["OVERFITTING"]["suggestion"] == {"model.classifier.drop_rate": 0.3}
    change(falling, lambda row: row.update(loss=1.0 + row["step"] / 100) if "loss" in row else None)
    assert "VALIDATION_FALLING" in found(advise(falling, settings())) and "OVERFITTING" not in found(
        advise(falling, settings())
    )


def test_rising_metric_suggests_longer_training(tmp_path: Path):
    folder = healthy(tmp_path / "run", single={"top1": 0.5})
    change(
        folder,
        lambda row: (
            row.update(validation={"top1": 0.5, "macro_f1": row["step"] / 200})
            if "validation" in row
            else row.update(epoch=3)
        ),
    )
    assert found(advise(folder, settings("train.classifier.epochs=10")))["ACCURACY_BELOW_GOAL"]["suggestion"] == {
        "train.classifier.epochs": 15
    }
    assert found(advise(folder, settings("train.classifier.epochs=3", "train.classifier.min_steps=100")))[
        "ACCURACY_BELOW_GOAL"
    ]["suggestion"] == {"train.classifier.min_steps": 150}


def test_slow_and_damaged_data(tmp_path: Path):
    folder = healthy(tmp_path / "run")
    change(folder, lambda row: row.update(data_time=0.4) if row["task"] == "detector" and "loss" in row else None)
    (folder / "decisions.json").write_text(
        json.dumps([{"what": "classifier data", "choice": "5 of 100 left out", "reason": "damaged", "fallback": True}])
    )
    (folder / "data_report.json").write_text(json.dumps({"classes": 50, "files": {"found": 1000, "quarantined": 30}}))
    report = advise(folder, settings("data.cache=none"))
    assert [reason["code"] for reason in report["reasons"]] == [
        "CORRUPT_SHARE_HIGH",
        "DATA_WAIT_HIGH",
        "CORRUPT_SHARE_HIGH",
    ] and report["recommendation"] == "proceed"
    assert [reason["measured"] for reason in report["reasons"]] == [0.05, 0.5, 0.03] and report["reasons"][1][
        "suggestion"
    ] == {"data.cache": "hotset"}
    assert found(advise(folder, settings("dataloader.num_workers=2")))["DATA_WAIT_HIGH"]["suggestion"] == {
        "dataloader.num_workers": "auto"
    }


def test_gpu_memory_is_checked_on_the_same_gpu_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = healthy(tmp_path / "run")
    change(folder, lambda row: row.update(cuda_mem=16_000.0) if "loss" in row else None)
    (folder / "decisions.json").write_text(
        json.dumps([{"what": "device", "choice": "cuda", "reason": "NVIDIA RTX 5080", "fallback": False}])
    )
    monkeypatch.setattr(diagnostics, "find_gpu", lambda: ("NVIDIA RTX 5080", 16 * 1024))
    assert found(advise(folder, settings()))["GPU_MEMORY_HIGH"]["suggestion"] == {"train.channels_last": False}
    monkeypatch.setattr(diagnostics, "find_gpu", lambda: ("NVIDIA H200", 16 * 1024))
    assert "GPU_MEMORY_HIGH" not in found(advise(folder, settings()))


@pytest.mark.parametrize("task, other", [("classifier", "MAP"), ("detector", "ACCURACY")])
def test_run_of_one_task_has_no_reasons_of_the_other(task: str, other: str, tmp_path: Path):
    folder = healthy(
        tmp_path / "run",
        tasks=(task,),
        single={"top1": 0.1},
        combo={"map50": 0.1},
        latency=None,
        coverage={"classes": 50, "tested": 1, "recognised": 0},
    )
    report = advise(folder, settings())
    assert list(report["facts"]["tasks"]) == [task] and not [code for code in found(report) if code.startswith(other)]
    if task == "detector":
        assert list(found(report)) == ["MAP_BELOW_GOAL"]


def test_validation_metrics_replace_a_missing_evaluation(tmp_path: Path):
    folder = healthy(tmp_path / "run")
    (folder / "evaluation.json").unlink()
    pl.DataFrame(
        {
            "split": ["train", "validation", "validation", "test"],
            "photo_kind": ["single", "single", "combination", "single"],
            "class_index": [0, 1, 2, 3],
        }
    ).write_parquet(folder / "manifest.parquet")
    (folder / "data_report.json").write_text(json.dumps({"classes": 4, "files": {"found": 4, "quarantined": 0}}))
    report = advise(folder, settings())
    assert (
        report["measured_on"] == "validation"
        and report["facts"]["figures"]["classifier"] == 1.0
        and "LATENCY_UNKNOWN" in found(report)
    )
    assert (
        report["facts"]["coverage"] == {"classes": 4, "tested": 2} and found(report)["COVERAGE_LOW"]["measured"] == 0.5
    )


@pytest.mark.parametrize(
    "name, content",
    [
        ("metrics.jsonl", "x\n"),
        ("decisions.json", "{"),
        ("evaluation.json", "{"),
        ("manifest.parquet", "x"),
        ("data_report.json", "[]"),
        ("config.yaml", "["),
    ],
)
def test_damaged_folders_get_advice(name: str, content: str, tmp_path: Path):
    folder = healthy(tmp_path / "run")
    (folder / name).write_text(content)
    report = advise(folder, settings())
    assert report["recommendation"] == ("stop" if name == "metrics.jsonl" else "proceed")
    with pytest.raises(RunError, match="There is no run"):
        advise(tmp_path, settings())


def test_report_is_written_without_tensorboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    real_import = builtins.__import__

    def import_without_tensorboard(name: str, *arguments: object) -> object:
        if name == "torch.utils.tensorboard":
            raise ImportError("No module named 'tensorboard'")
        return real_import(name, *arguments)

    folder = healthy(tmp_path / "run", single={"top1": 0.1})
    monkeypatch.setattr(builtins, "__import__", import_without_tensorboard)
    with caplog.at_level("INFO", logger="pillsnap"):
        advise(folder, settings())
    assert (folder / "reports" / "stage_2_evaluation.json").is_file() and not (folder / "tensorboard").exists()
    assert "ACCURACY_BELOW_GOAL: single top-1 is 0.100 on the test split, the goal of stage 2 is 0.6" in caplog.text
    assert (
        "advice for stage 2: tune" in caplog.text and "cannot be imported: No module named 'tensorboard'" in caplog.text
    )


def test_advice_is_in_tensorboard(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = healthy(tmp_path / "run", single={"top1": 0.1})
    advise(folder, settings())
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"advisor/top1", "advisor/map50", "advisor/latency_ms_p95"}
    assert events.Tags()["tensors"] == ["advisor/recommendation/text_summary", "advisor/reasons/text_summary"]
    assert b"tune" in events.Tensors("advisor/recommendation/text_summary")[0].tensor_proto.string_val[0]


def test_advice_of_a_trained_run(trained_run: Path):
    run_settings = load_settings(trained_run / "config.yaml", overrides=["latency.runs=4", "latency.warmup_runs=1"])
    evaluation = evaluate_run(trained_run, run_settings)
    assert (
        evaluation["latency"]["runs"] == 4
        and 0 < evaluation["latency"]["p50"] <= evaluation["latency"]["p95"]
        and "torch, this machine" in evaluation["latency"]["how"]
    )
    assert evaluation["coverage"]["classes"] == 3 and 1 <= evaluation["coverage"]["tested"] <= 3
    report = advise(trained_run, run_settings)
    assert (
        report["measured_on"] == "test"
        and report["facts"]["latency"] == evaluation["latency"]
        and "LATENCY_UNKNOWN" not in found(report)
    )


def test_commands_end_with_advice(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    assert cli.main(["evaluate", "--run", str(trained_run), "latency.runs=2", "latency.warmup_runs=0"]) == 0
    output = capsys.readouterr()
    assert "advice for stage 1: " in output.err and json.loads(output.out)["split"] == "test"

    def train_to_nan(chosen: Settings, folder: Path) -> Path:
        make_run(folder)
        add(folder, task="classifier", step=41, loss=None)
        raise TrainingError("The classifier loss is nan at step 40.")

    monkeypatch.setattr(training_run, "train", train_to_nan)
    assert cli.main(["train", "--run-dir", str(tmp_path / "run"), "--profile", "cpu"]) == 2
    output = capsys.readouterr()
    assert output.out == "" and "LOSS_NOT_FINITE" in output.err and "advice for stage 1: stop" in output.err
    assert output.err.endswith("pillsnap: The classifier loss is nan at step 40.\n")


def test_out_of_memory_in_the_first_step(tmp_path: Path):
    folder = make_run(tmp_path / "run", tasks=())
    add(folder, task="classifier", step=0, oom={"action": "give up", "to": None, "reason": "one image does not fit"})
    report = advise(folder, settings())
    assert (
        set(found(report)) == {"NOT_MEASURED", "LATENCY_UNKNOWN", "OUT_OF_MEMORY"}
        and report["recommendation"] == "stop"
    )
    assert found(advise(make_run(tmp_path / "none", tasks=()), settings()))["NOTHING_TRAINED"]["weight"] == "broken"
