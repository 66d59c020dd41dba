"""One real epoch on a tiny dataset with half precision and the compiler, and checks of its run folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest
import torch

from pillsnap.config.load import load_settings
from pillsnap.config.schema import Settings
from pillsnap.data.manifest import load_dataset
from pillsnap.evaluation.evaluate import TruePhoto, evaluate_run, held_out, identifier_of
from pillsnap.runtime.images import decode_image
from pillsnap.training.checkpoint import CheckpointError
from pillsnap.training.run import train
from pillsnap.training.trained import load_trained


def test_run_folder_has_all_files(trained_run: Path):
    names = {path.name for path in trained_run.iterdir()}
    assert {
        "best.pt",
        "last.pt",
        "config.yaml",
        "run.log",
        "metrics.jsonl",
        "decisions.json",
        "manifest.parquet",
        "class_map.json",
        "data_report.json",
        "tensorboard",
    } <= names
    assert load_settings(trained_run / "config.yaml").train.compile == "default"
    assert list((trained_run / "tensorboard").iterdir())


def test_both_networks_took_steps_and_were_evaluated(trained_run: Path):
    rows = [json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()]
    for task, metric in (("detector", "map50"), ("classifier", "macro_f1")):
        steps = [row for row in rows if row["task"] == task and "loss" in row]
        assert len(steps) >= 3 and [row["step"] for row in steps] == list(range(1, len(steps) + 1))
        assert {"epoch", "loss", "lr", "data_time", "compute_time", "throughput", "cuda_mem"} <= steps[0].keys()
        assert all(row["throughput"] > 0 for row in steps)
        assert any(metric in row["validation"] for row in rows if row["task"] == task and "validation" in row)


def test_number_format_and_compiler_are_recorded(trained_run: Path):
    decisions = {item["what"]: item for item in json.loads((trained_run / "decisions.json").read_text())}
    for task in ("detector", "classifier"):
        assert (
            decisions[f"{task} amp"]["choice"] == "bf16" and decisions[f"{task} amp"]["reason"] == "train.amp is bf16"
        )
        assert decisions[f"{task} memory format"]["choice"] == "channels_last"
        compiled = decisions[f"{task} compile"]
        if shutil.which(os.environ.get("CXX", "g++")):
            assert compiled["choice"] == "default" and not compiled["fallback"], compiled
        else:  # torch.compile needs a C++ compiler on a CPU
            assert compiled["choice"] == "eager" and compiled["fallback"] and compiled["reason"], compiled
    assert decisions["classifier weights"]["choice"] == "random initialisation"


def test_checkpoints_load_as_plain_data_with_class_map_and_decisions(trained_run: Path):
    best = torch.load(trained_run / "best.pt", weights_only=True)
    assert {"classifier", "detector", "rules", "config", "decisions", "git_revision", "best"} <= best.keys()
    assert len(best["rules"]["class_map"]["drugs"]) == 3
    assert best["model_config"]["classifier"] == {
        "name": best["models"]["classifier"],
        "input_size": 64,
        "num_classes": 3,
        "embedding_size": 128,
        "embedding_from": "features",
    }
    assert best["pytorch_version"] == str(torch.__version__)
    assert abs((datetime.now(UTC) - datetime.fromisoformat(best["training_date"])).total_seconds()) < 3600
    last = torch.load(trained_run / "last.pt", weights_only=True)
    assert {"network", "average", "optimizer", "scaler", "step", "epoch", "best"} <= last["tasks"]["detector"].keys()


def named_right(run: Path, photos: list[TruePhoto]) -> tuple[int, int]:
    """How many photos of one pill get their drug as the first candidate, and as one of the first five."""
    identifier = identifier_of(load_trained(run), torch.device("cpu"))
    ranks = []
    for photo in photos:
        pill = identifier.identify(decode_image(Path(photo.image)), "single").pills[0]
        classes = [identifier.rules.class_map.index_of(candidate.drug.code) for candidate in pill.candidates]
        ranks.append(classes.index(photo.classes[0]) if photo.classes[0] in classes else 99)
    return sum(rank == 0 for rank in ranks), sum(rank < 5 for rank in ranks)


def test_the_evaluation_counts_what_a_user_would_count(trained_run: Path):
    report = evaluate_run(trained_run, load_settings(trained_run / "config.yaml"))
    assert report["split"] == "test" and report["single"]["images"] > 0 and report["combo"]["pills"] > 0
    assert json.loads((trained_run / "evaluation.json").read_text()) == report
    singles, combinations = (
        [photo for photo in held_out(load_dataset(trained_run))[1] if photo.kind == kind]
        for kind in ("single", "combination")
    )
    assert report["single"]["images"] == len(singles)
    assert report["combo"]["pills"] == sum(len(photo.boxes) for photo in combinations)
    right, in_top5 = named_right(trained_run, singles)
    assert report["single"]["top1"] == pytest.approx(right / len(singles))
    assert report["single"]["top5"] == pytest.approx(in_top5 / len(singles))
    assert report["combo"]["map50_95"] <= report["combo"]["map50"] <= 1
    assert (
        0 <= report["combo"]["end_to_end_top1"] <= report["combo"]["recall"] <= 1
    )  # a pill that is missed is not named


def test_resuming_without_a_checkpoint_starts_anew_with_a_fallback(
    tiny_settings: Callable[..., Settings], tmp_path: Path
):
    run = train(tiny_settings("train.resume=last", "train.interleave_ratio=[1,1]", "train.amp=off"), tmp_path / "new")
    decisions = {item["what"]: item for item in json.loads((run / "decisions.json").read_text())}
    assert decisions["resume"]["choice"] == "a new start" and decisions["resume"]["fallback"]


def test_damaged_and_missing_checkpoints_are_refused(trained_run: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        load_trained(tmp_path)
    (tmp_path / "best.pt").write_bytes((trained_run / "best.pt").read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="damaged"):
        load_trained(tmp_path)


@pytest.mark.parametrize("overrides", [["data.cache=hotset"], ["data.cache=none", "dataloader.num_workers=2"]])
def test_a_truncated_photo_is_counted_and_not_trained_on(
    overrides: list[str], tiny_data: Path, tiny_settings: Callable[..., Settings], tmp_path: Path
):
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    for photo in sorted(data.glob("train/images/single/*/*/*.png"))[::10]:
        photo.write_bytes(photo.read_bytes()[:2000])
    run = train(tiny_settings("train.amp=off", *overrides, data=data), tmp_path / "run")
    left_out = [item for item in json.loads((run / "decisions.json").read_text()) if item["what"] == "classifier data"]
    assert left_out and all(item["fallback"] and "damaged" in item["reason"] for item in left_out)
    report = evaluate_run(run, load_settings(run / "config.yaml"))
    manifest = load_dataset(run).manifest
    assert (
        0
        < report["single"]["images"]
        <= len(manifest.filter((pl.col("split") == "test") & (pl.col("photo_kind") == "single")))
    )


def test_a_folder_that_holds_a_run_is_never_overwritten(trained_run: Path, tiny_settings: Callable[..., Settings]):
    before = (trained_run / "last.pt").read_bytes()
    with pytest.raises(CheckpointError, match="already holds a run"):
        train(tiny_settings("train.amp=off"), trained_run)
    assert (trained_run / "last.pt").read_bytes() == before
