"""The training benchmark from end to end at a tiny size, and what it does when something can't be measured."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import HEAD, TINY, goal_values

from pillsnap.bench.errors import BenchError
from pillsnap.bench.training import main as train
from pillsnap.bench.training.ultralytics_loop import UltralyticsTrainer

ROOT = Path(__file__).parents[1]
NETWORKS = [text for text in TINY if text.startswith("model.")]
SHORT = "--rounds 1 --steps 2 --warmup 1 --seeds 1 --epochs 1 1 --batch 8 4".split()
KEYS = {
    *HEAD,
    "goals",
    "accuracy",
    "data_time_share",
    "images_per_second",
    "setup",
    "rounds",
    "seconds",
}


@pytest.fixture(scope="module")
def report(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """One run of everything, as `make bench-train` starts it."""
    out = tmp_path_factory.mktemp("bench") / "out"
    command = [
        sys.executable,
        "-m",
        "pillsnap.bench.training.main",
        *SHORT,
        "--data-root",
        str(tiny_data),
        "--out",
        str(out),
        *NETWORKS,
        "train.amp=bf16",
        f"paths.cache_root={out.parent / 'cache'}",
    ]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 0, done.stderr
    assert "classifier over limit" in done.stdout and "train.json" in done.stdout
    assert [path.name for path in out.iterdir()] == ["train.json"], "files of other trainers stay behind"
    return json.loads((out / "train.json").read_text(encoding="utf-8"))


def test_the_report_holds_everything(report: dict) -> None:
    assert set(report) == KEYS
    goals = goal_values(report)
    assert set(goals) == {
        "classifier_over_limit",
        "detector_over_limit",
        "classifier_over_timm",
        "detector_over_ultralytics",
        "classifier_accuracy",
        "detector_accuracy",
    }
    ratios = [value for name, value in goals.items() if "_over_" in name]
    assert all(math.isfinite(value) and value > 0 for value in [*ratios, *report["images_per_second"].values()])
    assert {
        "classifier_ours",
        "classifier_limit",
        "classifier_timm_0_workers",
        "detector_ours",
        "detector_limit",
        "detector_ultralytics",
        "detector_ours_float32",
    } <= set(report["images_per_second"])
    for fraction in report["data_time_share"].values():
        assert 0 <= fraction["waited"] <= fraction["data_time"] <= 1
    assert (
        report["versions"]["timm"]
        and report["versions"]["ultralytics-opencv-headless"]
        and report["machine"]["cores"] >= 1
    )
    networks = report["setup"]["networks"]
    assert networks["detector"]["size"] == 96 and networks["detector"]["ways"]["theirs"] == "float32, contiguous"
    for name, network in networks.items():
        assert network["ways"]["ours"].startswith("bf16, ") and network["ways"].keys() == {"ours", "limit", "theirs"}
        other = [contender for contender in report["rounds"] if contender.startswith(f"{name}_limit, ")]
        assert len(other) == 1 and other != [f"{name}_limit, {network['ways']['limit']}"], (
            "the slower of the two limits"
        )


def test_both_trainers_are_evaluated(report: dict) -> None:
    for name, peer in (("classifier", "timm"), ("detector", "ultralytics")):
        found = report["accuracy"][name]
        assert set(found["ours"]) == set(found[peer]) == {"0"} and found["mean"].keys() == found["spread"].keys() == {
            "ours",
            peer,
        }
        assert all(0 <= value <= 1 for value in found["mean"].values()) and found["photos"]["validation"] > 0


def test_the_ratio_to_ultralytics_is_taken_in_its_number_format(report: dict) -> None:
    rounds = report["rounds"]
    assert goal_values(report)["detector_over_ultralytics"] == pytest.approx(
        rounds["detector_ours_float32"][0] / rounds["detector_ultralytics"][0], rel=0.02
    )


def test_an_impossible_run_ends_with_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for words, message in (
        (["--rounds", "0"], "--rounds is 0"),
        (["--detector-data", str(tmp_path / "none")], "there is no folder"),
        (["--profile", "h200"], "--batch and --workers"),
        (["train.lr=fast"], "train.lr"),
    ):
        assert train.main([*words, "--out", str(tmp_path / "out")]) == 2
        line = capsys.readouterr().err
        assert message in line and len(line.strip().splitlines()) == 1 and "Traceback" not in line
    assert not (tmp_path / "out" / "train.json").exists()


def test_a_trainer_that_ends_early_is_reported(tmp_path: Path) -> None:
    with (
        pytest.raises(BenchError, match="ended early"),
        UltralyticsTrainer(
            tmp_path, str(ROOT / "tests" / "tiny_detector.yaml"), {"weight": torch.zeros(1)}, {"data": "nowhere.yaml"}
        ) as trainer,
    ):
        trainer.steps(1, 1)
