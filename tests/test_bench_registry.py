"""`make bench-registry` in small, from killed pushes to its report."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from conftest import HEAD, TINY, goal_values

from pillsnap.bench.errors import BenchError
from pillsnap.bench.registry import main as bench
from pillsnap.bench.registry import overhead
from pillsnap.bench.registry.places import new_repository
from pillsnap.bench.registry.pushes import check_pushes, push_and_kill

FEW = "--pushes 12 --kills 4 --later 1 --pairs 1 --rounds 1 --megabytes 2".split()
PLACES = ("folder", "s3", "lakefs")


def test_everything_in_small(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "push_and_kill", partial(push_and_kill, writers=2))
    monkeypatch.setattr(bench, "paired_trainings", lambda *given: [(200.0, 202.0)])  # below
    words = [*FEW, "--data", str(tiny_data), "--out", str(tmp_path / "out"), *TINY, "data.classes=2"]
    assert bench.main(words) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "registry.json").read_text(encoding="utf-8"))
    assert HEAD <= set(report) and "answers equal" in printed and "MB/s by the bare client" in printed
    values = goal_values(report)
    assert values["pushes_lost"] == values["versions_half"] == 0 and values["push_mb_per_s"] > 0
    for place in PLACES:
        found = report["values"]["pushes"][place]
        assert (
            found["lost"] == found["half"] == 0
            and found["pushes"] == 12
            and found["numbers"] >= found["versions"] >= 12
        )
    assert values["answers_equal"] == 1 and values["tracking_overhead"] == 0.01
    answers = report["values"]["answers"]
    assert answers["trainings"] == 1 and answers["registered"] == "2" and answers["moved"] and answers["photos"] > 8
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["registry.json"], "work stays behind"


def test_pairs_differ_in_tracking_only_and_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []

    def trained(run: Path, words: list[str]) -> float:
        asked.append((run.name, list(words)))
        return 100.0 + 2 * any(word.startswith("tracking.url=sqlite") for word in words)

    monkeypatch.setattr(overhead, "training_seconds", trained)
    pairs = overhead.paired_trainings(tmp_path, 2, ["seed=7"])
    assert overhead.overheads(pairs) == [0.02, 0.02]
    assert [name for name, _ in asked] == ["warm", "plain-0", "tracked-0", "tracked-1", "plain-1"]
    plain, tracked = dict(asked)["plain-1"], dict(asked)["tracked-1"]
    assert set(tracked) - set(plain) == {f"tracking.url=sqlite:///{tmp_path / 'mlflow.db'}"} and "seed=7" in plain


def test_a_version_that_is_overwritten_in_lakefs_is_lost(lakefs_repository: str, tmp_path: Path) -> None:
    from pillsnap.registry.store import open_store

    url = new_repository()
    told, _ = push_and_kill(url, tmp_path / "writers", 3, 0, writers=1)
    assert check_pushes(url, told, tmp_path / "cache")["lost"] == 0
    with open_store(url).objects.change("damage", {}) as change:
        change.write("models/classifier/v2/model.onnx", b"other weights")
    found = check_pushes(url, told, tmp_path / "another cache")
    assert found["lost"] == found["half"] == 1 and found["versions"] == 3


def test_what_can_not_be_done_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--pushes", "0", "--out", str(tmp_path)]) == 2
    assert "are counts from 1 on" in capsys.readouterr().err
    with pytest.raises(BenchError, match=r"A writer ended with status 1: .*writer-0.err says why"):
        push_and_kill("lakefs://nowhere", tmp_path / "writers", 1, 0, writers=1)
    with pytest.raises(BenchError, match="A training failed: pillsnap: .*train.lrr"):
        overhead.training_seconds(tmp_path / "run", ["train.lrr=1"])
