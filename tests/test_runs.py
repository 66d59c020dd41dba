"""Run folders: complete, incomplete, damaged, of one task; listed and compared without a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pillsnap import cli
from pillsnap.comparison import COLUMNS, compare_runs, differing, list_runs
from pillsnap.runlog import COMPLETE, FAILED
from pillsnap.runs import RunError, read_run, run_state


def make_run(
    folder: Path,
    tasks: tuple[str, ...] = ("classifier", "detector"),
    steps: int = 40,
    lr: float = 0.001,
    ending: str = COMPLETE,
) -> Path:
    """Write a run folder with the files of a training and rising metrics."""
    folder.mkdir(parents=True)
    metrics = {
        "classifier": lambda step: {"top1": step / 50, "macro_f1": step / 60},
        "detector": lambda step: {"map50": step / 70},
    }
    rows = []
    for task in tasks:
        for step in range(1, steps + 1):
            rows.append(
                {
                    "task": task,
                    "step": step,
                    "epoch": 0,
                    "images": 16,
                    "loss": 4 / step,
                    "lr": lr,
                    "data_time": 0.2,
                    "compute_time": 0.4,
                    "throughput": 80.0,
                    "cuda_mem": 0.0,
                }
            )
            if step % 20 == 0:
                rows.append({"task": task, "step": step, "validation": metrics[task](step)})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(f"profile: cpu\nstage: 2\ntrain:\n  lr: {lr}\n  amp: auto\n")
    (folder / "decisions.json").write_text(
        json.dumps([{"what": "amp", "choice": "fp16", "reason": "no bfloat16", "fallback": True}])
    )
    (folder / "run.log").write_text(
        f"2026-01-02 03:04:05,678 INFO    amp: fp16\n2026-01-02 03:09:05,678 INFO    {ending}\n"
    )
    return folder


def test_complete_and_nested_runs_are_listed(tmp_path: Path):
    make_run(tmp_path / "demo" / "train")
    make_run(tmp_path / "one", tasks=("classifier",), steps=20)
    (tmp_path / "demo" / "train" / "evaluation.json").write_text(
        json.dumps({"single": {"top1": 0.7}, "combo": {"map50": 0.5}})
    )
    (tmp_path / "demo" / "train" / "reports").mkdir()
    (tmp_path / "demo" / "train" / "reports" / "stage_2_evaluation.json").write_text('{"recommendation": "tune"}')
    (tmp_path / "latest").write_text("demo/train\n")
    table = {row["run"]: row for row in list_runs(tmp_path).iter_rows(named=True)}
    assert set(table) == {"demo/train", "one"}
    nested = table["demo/train"]
    assert (nested["stage"], nested["state"], str(nested["started"])) == (2, "finished", "2026-01-02 03:04:05")
    assert (nested["classifier_steps"], nested["detector_steps"], nested["minutes"]) == (40, 40, 0.8)
    assert (nested["top1"], nested["macro_f1"], nested["map50"], nested["test_top1"], nested["test_map50"]) == (
        0.8,
        0.6667,
        0.5714,
        0.7,
        0.5,
    )
    assert (
        nested["classifier_img_s"],
        nested["fallbacks"],
        nested["shortages"],
        nested["advice"],
        nested["problems"],
    ) == (80.0, 1, 0, "tune", "")
    assert (
        table["one"]["detector_steps"] is None and table["one"]["map50"] is None and table["one"]["test_top1"] is None
    )


@pytest.mark.parametrize(
    "name, content, problem",
    [
        ("metrics.jsonl", "", ""),
        (
            "metrics.jsonl",
            'nonsense\n[1]\n{"step": 3}\n{"task": "classifier", "step": Infinity}\n',
            "4 of 4 lines of metrics.jsonl are damaged",
        ),
        (
            "metrics.jsonl",
            '{"task": "classifier", "step": 1, "loss": null, "data_time": "x", "throughput": true}\n{"task": "cl',
            "",
        ),
        ("metrics.jsonl", '{"task": "classifier", "step": 1, "validation": {"macro_f1": null}}\n', ""),
        ("metrics.jsonl", b"\xff\xfe\x00", "metrics.jsonl cannot be read: it is not UTF-8 text"),
        ("metrics.jsonl", None, "metrics.jsonl is missing"),
        ("config.yaml", "stage: [1", "config.yaml is damaged"),
        ("config.yaml", "just words", "config.yaml is damaged"),
        ("config.yaml", "stage: many\n", ""),
        ("decisions.json", '[{"what": "am', "decisions.json is damaged"),
        ("decisions.json", '{"what": 1}', "decisions.json is damaged"),
        ("decisions.json", "[1, 2]", ""),
        ("evaluation.json", "[]", "evaluation.json is damaged"),
        ("evaluation.json", '{"single": [], "combo": {"map50": "high"}}', ""),
        ("run.log", "no stamp at all\n", ""),
    ],
)
def test_damaged_files_are_listed_as_problems(name: str, content: str | bytes | None, problem: str, tmp_path: Path):
    folder = make_run(tmp_path / "run")
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    table = list_runs(tmp_path)
    assert table["problems"].to_list() == [problem] and table.columns == list(COLUMNS)
    assert compare_runs([folder]).columns == ["what", "run"]


def test_run_state(tmp_path: Path):
    failed = make_run(tmp_path / "failed", ending=f"{FAILED}TrainingError: The classifier loss is nan.")
    silent = make_run(tmp_path / "silent", ending="classifier step 20 of 90 epoch 0 loss 1.0")
    assert (
        run_state(read_run(failed)) == "stopped"
        and "TrainingError: The classifier loss is nan" in list_runs(tmp_path).filter(run="failed")["problems"][0]
    )
    assert run_state(read_run(silent)) == "running"
    for path in silent.iterdir():
        os.utime(path, (1e9, 1e9))
    assert run_state(read_run(silent)) == "stopped"


def test_repeated_steps_count_once_with_the_last_values(tmp_path: Path):
    folder = make_run(tmp_path / "run", tasks=("classifier",), steps=30)
    with (folder / "metrics.jsonl").open("a") as file:
        for step in range(21, 26):
            file.write(json.dumps({"task": "classifier", "step": step, "loss": 9.0}) + "\n")
    steps = read_run(folder).steps("classifier")
    assert [row["step"] for row in steps] == list(range(1, 31)) and [row["loss"] for row in steps[20:25]] == [9.0] * 5


def test_links_and_folders_inside_a_run_are_not_searched(tmp_path: Path):
    make_run(tmp_path / "run")
    make_run(tmp_path / "run" / "inner")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert list_runs(tmp_path)["run"].to_list() == ["run"]


def test_comparison_of_two_runs(tmp_path: Path):
    first, second = (
        make_run(tmp_path / "a" / "train"),
        make_run(tmp_path / "b" / "train", tasks=("classifier",), lr=0.002),
    )
    table = compare_runs([first, second])
    assert table.columns == ["what", str(first), str(second)], "equal names are written in full"
    rows = {what: tuple(values) for what, *values in table.iter_rows()}
    assert (
        rows["train.lr"] == ("0.001", "0.002")
        and rows["map50"] == ("0.5714", "")
        and "train.amp" not in rows
        and "stage" in rows
    )
    with pytest.raises(RunError, match="There is no run in"):
        compare_runs([first, tmp_path])
    assert differing({"x": {"a": {"b": 1}}, "y": {"a": {"b": 1, "c": None}, "d": [1, 2]}}) == [
        {"what": "d", "x": "", "y": "[1, 2]"}
    ]


def test_runs_command_lists_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture):
    make_run(tmp_path / "first-of-all-the-runs-with-quite-a-long-name"), make_run(tmp_path / "second", lr=0.002)
    root = f"paths.run_root={tmp_path}"
    assert cli.main(["runs", root]) == 0
    listed = capsys.readouterr().out
    assert (
        "first-of-all-the-runs-with-quite-a-long-name" in listed
        and "…" not in listed
        and all(name in listed for name in COLUMNS)
    )
    assert cli.main(["runs", "second", "first-of-all-the-runs-with-quite-a-long-name", root]) == 0
    assert "train.lr" in capsys.readouterr().out
    assert cli.main(["runs", "third", root]) == 2
    assert (
        capsys.readouterr().err == f"pillsnap: There is no run in {tmp_path / 'third'}: "
        "name a folder that training has made, `pillsnap runs` lists them.\n"
    )


def test_listing_imports_no_torch(tmp_path: Path):
    make_run(tmp_path / "run")
    code = (
        "import sys; from pillsnap import cli; "
        f"sys.exit(cli.main(['runs', 'paths.run_root={tmp_path}']) or 'torch' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True).returncode == 0
    )


def test_the_record_of_a_real_run(trained_run: Path):
    record = read_run(trained_run)
    assert run_state(record) == "finished" and record.tasks == ["classifier", "detector"] and not record.problems
    row = list_runs(trained_run.parent).filter(run="smoke").row(0, named=True)
    assert row["classifier_steps"] >= 3 and 0 <= row["map50"] <= 1 and row["minutes"] > 0
