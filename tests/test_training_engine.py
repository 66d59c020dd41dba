"""Runs survive kills, signals, lack of memory, dead processes and full disks, and end with the same weights."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from pillsnap.cli import main
from pillsnap.config.load import settings_as_yaml
from pillsnap.config.schema import Settings
from pillsnap.data.manifest import Dataset, load_dataset
from pillsnap.evaluation.advisor import advise
from pillsnap.training import checkpoint, loop, step
from pillsnap.training import run as run_module
from pillsnap.training.checkpoint import CheckpointError, load_checkpoint
from pillsnap.training.run import train
from pillsnap.training.schedule import TrainingError
from pillsnap.training.trained import load_trained

SHORT = ("train.amp=off", "train.log_every=1000", "train.classifier.epochs=2", "train.detector.epochs=2")


def weights_hash(folder: Path) -> str:
    """Hash of all weights, averaged ones, and optimizer states at the end of a run."""
    digest = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(value.contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                digest.update(str(key).encode())
                add(value[key])
        elif isinstance(value, list):
            for item in value:
                add(item)

    for _, task in sorted(load_checkpoint(folder / "last.pt")["tasks"].items()):
        assert task["seen"] == task["total"]
        add({part: task[part] for part in ("network", "average", "optimizer", "best_state")})
    return digest.hexdigest()


def rows_of(folder: Path) -> list[dict]:
    """The run's metrics."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and loss of every step."""
    return {
        task: [(row["step"], row["loss"]) for row in rows_of(folder) if row["task"] == task and "loss" in row]
        for task in ("detector", "classifier")
    }


def decisions_of(folder: Path) -> dict[str, dict]:
    """The run's decisions, the last one of each kind."""
    return {item["what"]: item for item in json.loads((folder / "decisions.json").read_text())}


@pytest.fixture(scope="module")
def whole(tiny_settings: Callable[..., Settings], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    return train(tiny_settings(*SHORT), tmp_path_factory.mktemp("engine") / "whole")


FORKED = """
import os, signal, sys, time
from pathlib import Path
from pillsnap.config.load import load_settings
from pillsnap.training.run import train

settings, folder = load_settings(Path(sys.argv[1]), overrides=["train.resume=last"]), Path(sys.argv[2])
delays, number = [float(text) for text in sys.argv[3:]], 0

def begin():
    child = os.fork()
    if not child:
        train(settings, folder / str(number))
        os._exit(0)
    return child

while delays:
    child = begin()
    time.sleep(delays[0])
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    print("killed" if os.WIFSIGNALED(status) else f"ended {os.waitstatus_to_exitcode(status)}", flush=True)
    if os.WIFSIGNALED(status):
        delays.pop(0)
    else:  # too fast to be killed: another run, and sooner
        number, delays[0] = number + 1, delays[0] / 2
print(f"ended {os.waitstatus_to_exitcode(os.waitpid(begin(), 0)[1])}", flush=True)
"""


def test_a_run_killed_at_ten_random_moments_ends_with_the_same_weights(
    whole: Path, tiny_settings: Callable[..., Settings], tmp_path: Path
):
    settings = tmp_path / "settings.yaml"
    settings.write_text(settings_as_yaml(tiny_settings(*SHORT, "train.save_minutes=0.002")))
    moments = random.Random(7)
    delays = [str(round(moments.uniform(0.3, 4.0), 2)) for _ in range(10)]
    done = subprocess.run(
        [sys.executable, "-c", FORKED, str(settings), str(tmp_path / "run"), *delays],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.split("\n")
    assert lines.count("killed") == 10 and set(lines) == {"killed", "ended 0", ""}, (lines, done.stderr[-3000:])
    for run in (tmp_path / "run").iterdir():
        assert weights_hash(run) == weights_hash(whole)
        assert losses(run) == losses(whole), "metrics.jsonl has every step once"
        assert not list(run.glob(".*")), "no temporary file of a killed process is left"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_with_one_sentence(
    number: signal.Signals, whole: Path, tiny_settings: Callable[..., Settings], tmp_path: Path
):
    settings = tmp_path / "settings.yaml"
    settings.write_text(settings_as_yaml(tiny_settings(*SHORT)))
    command = [
        sys.executable,
        "-m",
        "pillsnap",
        "train",
        "--cfg",
        str(settings),
        "--run-dir",
        str(tmp_path / "run"),
        "train.resume=last",
        "dataloader.num_workers=1",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count('"loss"') < 5:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(number)
    _, output = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert (
        f"Stopped by {number.name}" in output.splitlines()[-1]
        and "train.resume=last" in output.splitlines()[-1]
        and "Traceback" not in output
    )
    stopped = load_checkpoint(tmp_path / "run" / "last.pt")["tasks"]
    assert 5 <= sum(task["step"] for task in stopped.values()) and any(
        task["seen"] < task["total"] for task in stopped.values()
    )
    train(tiny_settings(*SHORT, "train.resume=last"), tmp_path / "run")
    assert weights_hash(tmp_path / "run") == weights_hash(whole)


class Shortage:
    """Memory runs out at given steps of a task, a given number of times."""

    def __init__(
        self,
        task: str,
        at: dict[int, int],
        error: Callable[[], Exception] = lambda: torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB"
        ),
    ):
        self.task, self.at, self.error = task, dict(at), error

    def install(self, patch: pytest.MonkeyPatch, inside: str = "_gradients") -> Shortage:
        """Make a function of the step fail."""
        real = getattr(step, inside)

        def failing(task, *rest):
            if task.name == self.task and self.at.get(task.progress.step, 0) > 0:
                self.at[task.progress.step] -= 1
                raise self.error()
            return real(task, *rest)

        patch.setattr(step, inside, failing)
        return self


def oom_actions(folder: Path) -> list[tuple[str, int, str]]:
    """Task, step and action of each out-of-memory event."""
    return [(row["task"], row["step"], row["oom"]["action"]) for row in rows_of(folder) if "oom" in row]


@pytest.mark.parametrize("inside", ["_gradients", "_clip"])
def test_a_step_that_runs_out_of_memory_once_is_retried(
    inside: str, whole: Path, tiny_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    Shortage("classifier", {3: 1, 7: 1}).install(monkeypatch, inside)
    run = train(tiny_settings(*SHORT), tmp_path / "run")
    assert oom_actions(run) == [("classifier", 3, "empty_cache"), ("classifier", 7, "empty_cache")]
    assert losses(run) == losses(whole), "the failed batch was retried"
    if inside == "_gradients":
        assert weights_hash(run) == weights_hash(whole), "nothing else changed"
    state = load_checkpoint(run / "last.pt")["tasks"]["classifier"]
    assert [event["action"] for event in state["ladder"]["history"]] == ["empty_cache", "empty_cache"]


def test_the_ladder_takes_all_actions_and_every_sample_is_still_seen(
    whole: Path, tiny_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    Shortage("classifier", {4: 5}).install(monkeypatch)
    seen: list[tuple[int, ...]] = []
    real = step._update
    monkeypatch.setattr(
        step,
        "_update",
        lambda task: (seen.append((task.name == "classifier", *task.pending_batch.numbers.tolist())), real(task))[1],
    )
    run = train(tiny_settings(*SHORT, "train.max_grad_accum=3"), tmp_path / "run")
    assert [action for _, _, action in oom_actions(run)] == [
        "empty_cache",
        "half precision",
        "grad_accum",
        "grad_accum",
        "batch_size",
    ]
    state = load_checkpoint(run / "last.pt")["tasks"]["classifier"]
    assert state["ladder"]["batch"] == 4 and state["ladder"]["pieces"] <= 3 and state["amp"] == "bf16"
    before = load_checkpoint(whole / "last.pt")["tasks"]["classifier"]
    assert state["seen"] == before["seen"] and state["step"] == 4 + 2 * (before["step"] - 4)
    order = [number for is_classifier, *numbers in seen if is_classifier for number in numbers]
    monkeypatch.undo()
    reference: list[int] = []
    monkeypatch.setattr(
        step,
        "_update",
        lambda task: (
            reference.extend(task.pending_batch.numbers.tolist()) if task.name == "classifier" else None,
            real(task),
        )[1],
    )
    train(tiny_settings(*SHORT), tmp_path / "reference")
    assert order == reference, "the same samples in the same order, in smaller batches"
    rates = {
        (row["step"] if row["step"] <= 4 else (row["step"] + 4) / 2): row["lr"]
        for row in rows_of(run)
        if row["task"] == "classifier" and "loss" in row
    }
    undisturbed = {row["step"]: row["lr"] for row in rows_of(whole) if row["task"] == "classifier" and "loss" in row}
    assert all(abs(rates[number] - undisturbed[number]) < 1.5e-4 for number in range(1, 5)), (
        "the learning rate follows the samples seen"
    )
    assert decisions_of(run)["classifier out of memory"]["fallback"]


def test_memory_that_never_suffices_ends_with_one_sentence(
    tiny_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    Shortage("detector", {2: 10**6}).install(monkeypatch)
    with pytest.raises(TrainingError, match="memory.*train.resume=last") as error:
        train(tiny_settings(*SHORT), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert oom_actions(tmp_path / "run")[-1][2] == "give up"


def test_a_lack_of_memory_in_an_evaluation_makes_its_batches_smaller(
    whole: Path, tiny_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real, calls = loop.attempt, []

    def failing(action, group):
        calls.append(1)
        return (None, "out of memory") if len(calls) in (1, 2) else real(action, group)

    monkeypatch.setattr(loop, "attempt", failing)
    run = train(tiny_settings(*SHORT), tmp_path / "run")
    assert [action for _, _, action in oom_actions(run)] == ["evaluation batch", "evaluation batch"]
    assert weights_hash(run) == weights_hash(whole)
    monkeypatch.setattr(loop, "attempt", lambda action, group: (None, "out of memory"))
    with pytest.raises(TrainingError, match="does not suffice to evaluate"):
        train(tiny_settings(*SHORT), tmp_path / "never")


def test_a_lack_of_memory_in_the_first_step_after_resume(
    whole: Path, tiny_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stop_after(6, monkeypatch)
    with pytest.raises(loop.Stopped):
        train(tiny_settings(*SHORT), tmp_path / "run")
    monkeypatch.undo()
    state = load_checkpoint(tmp_path / "run" / "last.pt")["tasks"]
    Shortage(
        "classifier",
        {state["classifier"]["step"]: 1},
        error=lambda: RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: can't allocate memory: "
            "you tried to allocate 8 bytes."
        ),
    ).install(monkeypatch)
    run = train(tiny_settings(*SHORT, "train.resume=last"), tmp_path / "run")
    assert oom_actions(run) == [("classifier", state["classifier"]["step"], "empty_cache")]
    assert weights_hash(run) == weights_hash(whole)


def stop_after(steps: int, patch: pytest.MonkeyPatch) -> None:
    """Send this process SIGTERM after so many steps."""
    real, made = loop.train_step, []

    def stopping(*arguments):
        measured = real(*arguments)
        made.append(1)
        if len(made) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return measured

    patch.setattr(loop, "train_step", stopping)


def test_accumulated_micro_batches_are_resumed_and_counted(
    tiny_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    accumulate = (*SHORT, "train.classifier.batch_size=4", "train.classifier.grad_accum=2")
    run = train(tiny_settings(*accumulate), tmp_path / "whole")
    images = [row["images"] for row in rows_of(run) if row["task"] == "classifier" and "loss" in row]
    assert set(images) == {8}
    stop_after(9, monkeypatch)
    with pytest.raises(loop.Stopped):
        train(tiny_settings(*accumulate), tmp_path / "stopped")
    monkeypatch.undo()
    assert weights_hash(train(tiny_settings(*accumulate, "train.resume=last"), tmp_path / "stopped")) == weights_hash(
        run
    )


ACCUMULATED = (
    "train.classifier.batch_size=4",
    "train.classifier.grad_accum=2",
    "train.detector.batch_size=2",
    "train.detector.grad_accum=2",
)


def torchrun(settings: Settings, folder: Path, *more: str, processes: int = 2) -> subprocess.CompletedProcess:
    """Train with several processes."""
    file = folder.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(settings_as_yaml(settings))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
        "-m",
        "pillsnap",
        "train",
        "--cfg",
        str(file),
        "--run-dir",
        str(folder),
        *more,
    ]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def close(left: list[tuple[int, float]], right: list[tuple[int, float]]) -> bool:
    """Equal but for rounding, which grows from step to step."""
    return np.allclose(left[:10], right[:10], rtol=1e-4) and np.allclose(left, right, rtol=2e-2)


def test_two_processes_train_as_one(
    tiny_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = tiny_settings(*SHORT, *ACCUMULATED)
    alone = train(settings, tmp_path / "alone")
    done = torchrun(settings, tmp_path / "parallel")
    assert done.returncode == 0, done.stderr[-3000:]
    for task, steps in losses(alone).items():
        parallel = losses(tmp_path / "parallel")[task]
        assert [number for number, _ in parallel] == [number for number, _ in steps]
        assert close(parallel, steps), task
    metrics = [
        {(row["task"], row["step"]): row["validation"] for row in rows_of(folder) if "validation" in row}
        for folder in (alone, tmp_path / "parallel")
    ]
    assert metrics[0].keys() == metrics[1].keys()
    assert all(metrics[0][key]["images"] == metrics[1][key]["images"] for key in metrics[0]), (
        "each photo evaluated once"
    )
    stop_after(7, monkeypatch)
    with pytest.raises(loop.Stopped):
        train(settings, tmp_path / "split")
    monkeypatch.undo()
    done = torchrun(settings, tmp_path / "split", "train.resume=last")
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(close(losses(tmp_path / "split")[task], losses(alone)[task]) for task in ("detector", "classifier")), (
        "one process began, two continued"
    )
    assert load_trained(tmp_path / "split").rules.class_map.hash == load_trained(alone).rules.class_map.hash


def test_an_embedding_is_computed_from_the_crops_of_all_processes(
    tiny_settings: Callable[..., Settings], tmp_path: Path
):
    drawn = ("train.classifier.embedding_drawings=1", "train.evaluations=1", "train.only=classifier")
    settings = tiny_settings(*SHORT, *drawn, "data.validation_fraction=0")
    runs = [train(settings, tmp_path / "alone"), tmp_path / "parallel"]
    done = torchrun(settings, runs[1])
    assert done.returncode == 0, done.stderr[-3000:]
    reasons = [
        next(item["reason"] for item in json.loads((run / "decisions.json").read_text()) if item["what"] == "embedding")
        for run in runs
    ]
    crops = len(load_dataset(runs[0]).manifest.filter(pl.col("class_index") >= 0, split="train"))
    assert reasons == [f"from {crops} training crops; drawings of each: 1"] * 2
    for run in runs:
        layer = load_trained(run).classifier.embedding.weight
        assert layer.isfinite().all() and layer[: crops - 1].any(dim=1).all()
        assert not layer[crops - 1 :].any(), "so many crops differ in one direction less"


def test_a_batch_too_small_for_the_processes_is_one_sentence(tiny_settings: Callable[..., Settings], tmp_path: Path):
    done = torchrun(tiny_settings(*SHORT, "train.detector.batch_size=1"), tmp_path / "run")
    assert done.returncode != 0 and "train.detector.batch_size is 1, but 2 processes are to share it" in done.stderr


INJECTED = """
import os, sys
import torch
from pathlib import Path
from pillsnap.config.load import load_settings
from pillsnap.training import step, tasks
from pillsnap.training.run import train

where, rank, failed = sys.argv[3], os.environ["RANK"], []
def once(real, fails):
    def function(task, *rest):
        if rank == "1" and task.name == "classifier" and task.progress.step >= 2 and len(failed) < fails:
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(task, *rest)
    return function
if where == "evaluation":
    tasks.Task.in_turn = once(tasks.Task.in_turn, 1)
else:
    step._gradients = once(step._gradients, 4)
train(load_settings(Path(sys.argv[1])), Path(sys.argv[2]))
"""


@pytest.mark.parametrize("where", ["step", "evaluation"])
def test_all_processes_act_when_one_runs_out_of_memory(
    where: str, tiny_settings: Callable[..., Settings], tmp_path: Path
):
    (tmp_path / "program.py").write_text(INJECTED)
    (tmp_path / "settings.yaml").write_text(
        settings_as_yaml(tiny_settings(*SHORT, *ACCUMULATED, "train.max_grad_accum=2"))
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(tmp_path / "program.py"),
        str(tmp_path / "settings.yaml"),
        str(tmp_path / "run"),
        where,
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    actions = [action for _, _, action in oom_actions(tmp_path / "run")]
    assert actions == (
        ["evaluation batch"] if where == "evaluation" else ["empty_cache", "half precision", "grad_accum", "batch_size"]
    )
    last = load_checkpoint(tmp_path / "run" / "last.pt")["tasks"]["classifier"]
    assert last["seen"] == last["total"] and (where == "evaluation" or last["ladder"]["pieces"] == 4)


def test_a_lack_of_memory_in_the_weight_update_ends_the_run(
    tiny_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    Shortage("classifier", {3: 1}).install(monkeypatch, "_update")
    with pytest.raises(TrainingError, match="while the classifier's weights were moved.*train.resume=last"):
        train(tiny_settings(*SHORT), tmp_path / "run")


def test_uneven_parts_of_a_batch_are_computed(tiny_settings: Callable[..., Settings], tmp_path: Path):
    done = torchrun(
        tiny_settings(
            *SHORT,
            "train.only=classifier",
            "train.classifier.batch_size=1",
            "train.classifier.grad_accum=3",
            "train.classifier.epochs=1",
        ),
        tmp_path / "run",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {row["images"] for row in rows_of(tmp_path / "run") if "loss" in row} == {3}


def test_an_evaluation_missed_by_a_stop_follows_on_resume(
    whole: Path, tiny_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    due = next(row["step"] for row in rows_of(whole) if row["task"] == "classifier" and "validation" in row)
    stop_after(2 * due, monkeypatch)
    with pytest.raises(loop.Stopped):
        train(tiny_settings(*SHORT), tmp_path / "run")
    monkeypatch.undo()
    assert not [row for row in rows_of(tmp_path / "run") if row["task"] == "classifier" and "validation" in row], (
        "a stop does not wait for the evaluation"
    )
    run = train(tiny_settings(*SHORT, "train.resume=last"), tmp_path / "run")
    assert weights_hash(run) == weights_hash(whole)


def test_a_full_disk_leaves_gaps_in_the_log_and_the_run_continues(
    whole: Path,
    tiny_settings: Callable[..., Settings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pillsnap.runlog.write_json", full)
    assert weights_hash(train(tiny_settings(*SHORT), tmp_path / "run")) == weights_hash(whole)
    assert sum("has gaps from here on: No space left" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_run_folder_that_can_not_be_made_is_one_sentence(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_data: Path
):
    (tmp_path / "file").write_text("no folder")
    assert main(["train", "--run-dir", str(tmp_path / folder), "--profile", "cpu", "--data-root", str(tiny_data)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("pillsnap: train can't go on: ") and str(tmp_path / "file") in lines[-1]


def test_a_loss_that_is_not_a_number_names_the_photos(
    tiny_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real = step._gradients
    monkeypatch.setattr(
        step,
        "_gradients",
        lambda task, *rest: (
            real(task, *rest)[0] * (float("nan") if task.progress.step == 5 and task.name == "classifier" else 1.0),
            None,
        ),
    )
    with pytest.raises(TrainingError, match=r"loss is nan at step 6, with .*\.png.*last checkpoint is good"):
        train(tiny_settings(*SHORT, "train.save_minutes=0"), tmp_path / "run")
    last = load_checkpoint(tmp_path / "run" / "last.pt")["tasks"]["classifier"]
    assert last["step"] <= 5 and all(
        torch.isfinite(tensor).all() for tensor in last["network"].values() if tensor.is_floating_point()
    )


def test_a_dead_decoding_process_is_replaced(
    whole: Path, tiny_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real, killed = loop.train_step, []

    def killing(task, *rest):
        if task.progress.step == 4 and task.name not in killed:
            killed.append(task.name)
            for child in _children():
                os.kill(child, signal.SIGKILL)
        return real(task, *rest)

    monkeypatch.setattr(loop, "train_step", killing)
    run = train(tiny_settings(*SHORT, "dataloader.num_workers=1", "dataloader.prefetch_factor=1"), tmp_path / "run")
    assert len(killed) == 2 and "started again" in decisions_of(run)["classifier decoding process"]["choice"]
    assert weights_hash(run) == weights_hash(whole)


def _children() -> list[int]:
    return [
        int(text)
        for text in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        if b"resource_tracker" not in Path(f"/proc/{text}/cmdline").read_bytes()
    ]


def test_a_full_disk_leaves_the_previous_checkpoint(
    whole: Path, tiny_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real, saves = torch.save, []

    def filling(content, path):
        saves.append(path)
        if len(saves) > 4:
            Path(path).write_bytes(b"half of it")
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
        return real(content, path)

    monkeypatch.setattr(checkpoint.torch, "save", filling)
    with pytest.raises(CheckpointError, match="can't be written"):
        train(tiny_settings(*SHORT, "train.save_minutes=0.002"), tmp_path / "run")
    assert "training goes on" in decisions_of(tmp_path / "run")["checkpoint"]["reason"], (
        "a failed checkpoint does not end the run"
    )
    assert not list((tmp_path / "run").glob(".*"))
    monkeypatch.undo()
    before = load_checkpoint(tmp_path / "run" / "last.pt")["tasks"]
    assert any(task["seen"] < task["total"] for task in before.values())
    assert weights_hash(train(tiny_settings(*SHORT, "train.resume=last"), tmp_path / "run")) == weights_hash(whole)


def test_a_damaged_checkpoint_falls_back_to_the_previous_one(
    whole: Path, tiny_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stop_after(12, monkeypatch)
    with pytest.raises(loop.Stopped):
        train(tiny_settings(*SHORT, "train.save_minutes=0.002"), tmp_path / "run")
    monkeypatch.undo()
    last = tmp_path / "run" / "last.pt"
    last.write_bytes(last.read_bytes()[:-5000])
    run = train(tiny_settings(*SHORT, "train.resume=last"), tmp_path / "run")
    assert decisions_of(run)["checkpoint"]["choice"] == "previous.pt" and decisions_of(run)["checkpoint"]["fallback"]
    assert weights_hash(run) == weights_hash(whole)
    for name in ("last.pt", "previous.pt"):
        (run / name).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="damaged"):
        train(tiny_settings(*SHORT, "train.resume=last"), run)


def test_another_network_or_task_is_refused(whole: Path, tiny_settings: Callable[..., Settings]):
    before = {path.name: path.read_bytes() for path in whole.iterdir() if path.is_file()}
    for key, value in (
        ("model.classifier.name", "test_vit"),
        ("train.only", "detector"),
        ("train.classifier.epochs", "3"),
        ("seed", "7"),
        ("data.margin", "0.3"),
        ("model.detector.image_size", "64"),
        ("train.classifier.lr", "0.1"),
    ):
        with pytest.raises(CheckpointError, match=f"{key} was .*, now {value}"):
            train(tiny_settings(*SHORT, f"{key}={value}", "train.resume=last"), whole)
    assert {path.name: path.read_bytes() for path in whole.iterdir() if path.is_file()} == before, (
        "a refused run changes nothing"
    )
    train(tiny_settings(*SHORT, "train.resume=last", "dataloader.num_workers=1", "train.log_every=3"), whole)
    assert (whole / "manifest.parquet").read_bytes() == before["manifest.parquet"] and (
        whole / "last.pt"
    ).read_bytes() == before["last.pt"], "a complete run does nothing when it resumes"


def test_a_split_does_not_change_when_a_run_resumes(
    tiny_settings: Callable[..., Settings], tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    stop_after(5, monkeypatch)
    with pytest.raises(loop.Stopped):
        train(tiny_settings(*SHORT, data=data), tmp_path / "run")
    monkeypatch.undo()
    before = (tmp_path / "run" / "manifest.parquet").read_bytes()
    gone = sorted(data.glob("train/images/single/*/*/*.png"))[::7]
    for photo in gone:
        photo.unlink()
    run = train(tiny_settings(*SHORT, "train.resume=last", data=data), tmp_path / "run")
    assert (run / "manifest.parquet").read_bytes() == before
    assert decisions_of(run)["classifier data"]["choice"].endswith("left out")


def test_two_trainings_do_not_share_a_folder(tiny_settings: Callable[..., Settings], tmp_path: Path):
    with run_module.lock_run_folder(tmp_path / "run"):
        with pytest.raises(CheckpointError, match="Another process trains in"):
            train(tiny_settings(*SHORT), tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.lock"}


def test_hardest_samples_are_those_of_the_best_weights(
    tiny_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    scores, predictions = iter([0.5, 0.9, 0.1]), []
    real = loop.RunLog.evaluation

    def scored(self: loop.RunLog, task: str, number: int, metrics: dict[str, float]) -> None:
        if task == "classifier":
            metrics["macro_f1"] = next(scores)
        real(self, task, number, metrics)

    written = run_module.write_hardest
    monkeypatch.setattr(loop.RunLog, "evaluation", scored)
    monkeypatch.setattr(
        run_module,
        "write_hardest",
        lambda folder, logits, **rest: (predictions.append(logits.copy()), written(folder, logits, **rest))[1],
    )
    run = train(tiny_settings(*SHORT, "train.evaluations=3", "train.only=classifier"), tmp_path / "run")
    assert len(predictions) == 2, "written only with better weights"
    hardest = json.loads((run / "hardest.json").read_text())
    assert (
        hardest
        and (run / "confusions.json").exists()
        and (run / "plots" / "hardest.jpg").exists()
        and (run / "plots" / "loss.png").exists()
    )


@pytest.mark.parametrize("only", ["classifier", "detector"])
def test_a_network_for_other_image_sizes_is_not_reused(
    only: str, whole: Path, tiny_settings: Callable[..., Settings], tmp_path: Path
):
    other = "model.detector.image_size=64" if only == "classifier" else "data.margin=0.3"
    with pytest.raises(CheckpointError, match="its network can't be taken over"):
        train(tiny_settings(*SHORT, f"train.only={only}", f"train.start_from={whole}", other), tmp_path / "run")


def test_a_classifier_of_other_drugs_is_not_reused_and_its_last_layer_starts_anew(
    whole: Path, tiny_settings: Callable[..., Settings], tiny_data: Path, tmp_path: Path
):
    content = torch.load(whole / "best.pt", weights_only=True)
    content["rules"]["class_map"]["drugs"] = content["rules"]["class_map"]["drugs"][::-1]
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    codes = [drug["code"] for drug in content["rules"]["class_map"]["drugs"]]
    content["rules"]["class_map"]["hash"] = hashlib.sha256("\n".join(codes).encode()).hexdigest()
    torch.save(content, earlier / "best.pt")
    with pytest.raises(CheckpointError, match="other drugs"):
        train(tiny_settings(*SHORT, "train.only=detector", f"train.start_from={earlier}"), tmp_path / "reused")
    run = train(tiny_settings(*SHORT, f"train.start_from={earlier}"), tmp_path / "tuned")
    assert (
        "2 of" in decisions_of(run)["classifier weights"]["reason"]
        and "start anew" in decisions_of(run)["classifier weights"]["reason"]
    )


def test_a_run_of_one_network_reuses_the_other_from_an_earlier_run(
    whole: Path, tiny_settings: Callable[..., Settings], tmp_path: Path
):
    for only in ("classifier", "detector"):
        run = train(tiny_settings(*SHORT, f"train.only={only}"), tmp_path / only)
        assert (
            {row["task"] for row in rows_of(run)} == {only}
            and (run / f"best_{only}.pt").exists()
            and not (run / "best.pt").exists()
        )
        assert load_trained(run).networks().keys() == {only}
    run = train(tiny_settings(*SHORT, "train.only=classifier", f"train.start_from={whole}"), tmp_path / "tuned")
    tuned, before = load_trained(run), load_trained(whole)
    assert all(
        torch.equal(tensor, before.detector.state_dict()[name]) for name, tensor in tuned.detector.state_dict().items()
    )
    assert any(
        not torch.equal(tensor, before.classifier.state_dict()[name])
        for name, tensor in tuned.classifier.state_dict().items()
    )
    assert decisions_of(run)["classifier weights"]["choice"] == "an earlier run's"


def test_no_first_weights_are_computed_for_a_network_of_an_earlier_run(
    whole: Path, tiny_settings: Callable[..., Settings], tmp_path: Path
):
    drawn = ("train.only=classifier", "train.classifier.embedding_drawings=1", "train.evaluations=1")
    run = train(tiny_settings(*SHORT, *drawn, f"train.start_from={whole}"), tmp_path / "run")
    decisions = decisions_of(run)
    assert decisions["first weights"]["choice"] == "not computed" and decisions["embedding"]["choice"] == "computed"


def test_a_network_that_does_not_improve_stops_early(
    tiny_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = tiny_settings(*SHORT, "train.evaluations=6", "train.patience=2")
    real = loop.RunLog.evaluation
    monkeypatch.setattr(
        loop.RunLog,
        "evaluation",
        lambda self, task, number, metrics: (
            metrics.update({"macro_f1": 0.5} if task == "classifier" else {"map50": number / 1000}),
            real(self, task, number, metrics),
        )[1],
    )
    run = train(settings, tmp_path / "run")
    state = load_checkpoint(run / "last.pt")["tasks"]
    assert (
        state["classifier"]["evaluated"] == 3
        and state["classifier"]["seen"] < state["classifier"]["total"]
        and state["detector"]["seen"] == state["detector"]["total"]
    )
    assert "train.patience" in decisions_of(run)["classifier early stop"]["reason"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.schedule=onecycle"],
        ["train.evaluate_ema=false"],
        ["train.classifier.class_weights=inverse_frequency"],
        ["train.classifier.class_weights=effective_number"],
        ["train.grad_checkpointing=true"],
        ["train.interleave_ratio=[1,2]"],
        ["train.cuda_graphs=true"],
        ["train.classifier.batch_size=500", "train.detector.batch_size=100"],
    ],
)
def test_settings_change_the_training(
    overrides: list[str], whole: Path, tiny_settings: Callable[..., Settings], tmp_path: Path
):
    run = train(tiny_settings(*SHORT, *overrides), tmp_path / "run")
    same = weights_hash(run) == weights_hash(whole)
    if overrides[0] in ("train.cuda_graphs=true", "train.grad_checkpointing=true"):
        kind = "CUDA graphs" if "graphs" in overrides[0] else "gradient checkpointing"
        assert (
            decisions_of(run)[f"detector {kind}"]["choice"] == "off"
            and decisions_of(run)[f"detector {kind}"]["fallback"]
        )
    elif overrides[0] == "train.interleave_ratio=[1,2]":
        assert same and [row["task"][0] for row in rows_of(run) if "loss" in row][:6] == list("dccdcc"), (
            "the order of turns does not change the weights"
        )
    else:
        assert not same
    assert all(np.isfinite(loss) for steps in losses(run).values() for _, loss in steps)


def test_a_machine_without_compiler_or_tensorboard_trains(
    whole: Path, tiny_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def missing(*arguments: object, **options: object):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(torch, "compile", missing)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run = train(tiny_settings(*SHORT, "train.compile=max-autotune"), tmp_path / "run")
    decisions = decisions_of(run)
    assert (
        decisions["TensorBoard"]["choice"] == "off"
        and decisions["TensorBoard"]["fallback"]
        and not (run / "tensorboard").exists()
    )
    compiled = decisions["classifier compile"]
    assert compiled["choice"] == "eager" and "C compiler" in compiled["reason"]
    assert weights_hash(run) == weights_hash(whole)


def test_an_automatic_batch_size_is_measured_once_and_kept_on_resume(
    tiny_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    automatic = (
        *SHORT,
        "train.classifier.batch_size=auto",
        "train.classifier.batch_max=8",
        "train.detector.batch_size=auto",
        "train.detector.batch_max=4",
        f"paths.cache_root={tmp_path / 'cache'}",
    )
    stop_after(3, monkeypatch)
    with pytest.raises(loop.Stopped):
        train(tiny_settings(*automatic), tmp_path / "run")
    monkeypatch.undo()
    decisions = decisions_of(tmp_path / "run")
    sizes = {name: int(decisions[f"{name} batch size"]["choice"]) for name in ("detector", "classifier")}
    assert 1 <= sizes["detector"] <= 4 and 1 <= sizes["classifier"] <= 8
    (tmp_path / "cache" / "batch.json").write_text("{}")
    run = train(tiny_settings(*automatic, "train.resume=last"), tmp_path / "run")
    assert {row["images"] for row in rows_of(run) if row["task"] == "classifier" and "loss" in row} == {
        sizes["classifier"]
    }
    assert json.loads((tmp_path / "cache" / "batch.json").read_text()) == {}, "nothing is measured again"


def test_a_class_missing_from_validation_does_not_spoil_the_metrics(
    tiny_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real = run_module.save_dataset

    def without_one(dataset: Dataset, folder: Path) -> None:
        real(
            replace(
                dataset,
                manifest=dataset.manifest.filter(~((pl.col("split") == "validation") & (pl.col("class_index") == 1))),
            ),
            folder,
        )

    monkeypatch.setattr(run_module, "save_dataset", without_one)
    run = train(tiny_settings(*SHORT), tmp_path / "run")
    checks = [row["validation"] for row in rows_of(run) if row["task"] == "classifier" and "validation" in row]
    assert checks and all(0 <= metrics["macro_f1"] <= 1 and metrics["images"] > 0 for metrics in checks)
    assert any(
        item["code"].startswith("COVERAGE") or "COVERAGE" in item["code"]
        for item in advise(run, tiny_settings(*SHORT))["reasons"]
    ), "the advisor reports a drug without validation photos"
