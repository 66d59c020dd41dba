"""Plots of runs with gaps, of runs of one task, and of a real run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_runs import make_run

from pillsnap.config.load import load_settings
from pillsnap.data.manifest import load_dataset
from pillsnap.training.report.plots import batch_picture, progress_picture, write_hardest, write_plots


@pytest.mark.parametrize("tasks", [("classifier",), ("detector",), ("classifier", "detector")])
def test_plots_of_one_task_or_two_with_gaps(tasks: tuple[str, ...], tmp_path: Path):
    folder = make_run(tmp_path / "run", tasks=tasks, steps=500)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows[::7]:
        row.update(loss=None, data_time=None)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = write_plots(folder)
    assert [path.name for path in paths] == ["loss.png", "figures.png", "time.png"]
    widths = {Image.open(path).width for path in paths}
    assert len(widths) == 1 and (widths.pop() > 600) == (len(tasks) == 2)
    assert all(path.stat().st_size < 100_000 for path in paths)
    assert sorted(path.name for path in (folder / "plots").iterdir()) == ["figures.png", "loss.png", "time.png"], (
        "no temporary file is left"
    )


def test_hardest_samples_without_pixels_and_without_samples(tmp_path: Path):
    logits = np.array([[9, 0], [0, 9], [np.inf, 0]], np.float32)
    rows = write_hardest(
        tmp_path,
        logits,
        np.array([0, 0, 1]),
        np.array([5, 6, 7]),
        lambda number: None,
        ["K-1", "K-2"],
        {5: "a", 6: "b", 7: "c"},
    )
    assert [(row["image"], row["true"], row["given"]) for row in rows] == [
        ("c", "K-2", "K-1"),
        ("b", "K-1", "K-2"),
        ("a", "K-1", "K-1"),
    ]
    assert [row["loss"] for row in rows] == [None, 9.0001, 0.0001] and rows[1]["confidence"] == 0.9999
    assert (
        json.loads((tmp_path / "hardest.json").read_text()) == rows
        and Image.open(tmp_path / "plots" / "hardest.jpg").format == "JPEG"
    )
    assert (
        write_hardest(
            tmp_path / "empty",
            np.zeros((0, 2), np.float32),
            np.zeros(0, int),
            np.zeros(0, int),
            lambda number: None,
            ["K-1", "K-2"],
            [],
        )
        == []
    )


@pytest.mark.parametrize(
    "content",
    [
        "",
        "nonsense\n",
        '{"task": "classifier", "step": 1, "loss": null, "data_time": "x", "compute_time": null}\n',
        '{"task": "classifier", "step": 1, "validation": {"macro_f1": null}}\n',
    ],
)
def test_metrics_without_a_single_number(content: str, tmp_path: Path):
    folder = make_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_text(content)
    assert len(write_plots(folder)) == (3 if "loss" in content else 0)
    assert progress_picture(folder)[:4] == b"\x89PNG"


def test_the_plots_of_a_real_run(trained_run: Path):
    assert len(write_plots(trained_run)) == 3
    sheet = batch_picture(load_dataset(trained_run).manifest, load_settings(trained_run / "config.yaml"), count=4)
    assert sheet.width == 4 * 188 and len(sheet.getcolors(1 << 24)) > 1000
