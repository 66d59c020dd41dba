"""The data benchmark from end to end at a tiny size, and what it does when something is missing or goes wrong."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import HEAD, goal_values

from pillsnap.bench import photos
from pillsnap.bench.data import loaders
from pillsnap.bench.data import main as data
from pillsnap.bench.data.labels import synthetic_labels
from pillsnap.bench.data.peers import PEERS, why_missing
from pillsnap.bench.errors import BenchError
from pillsnap.bench.photos import plan_photos, write_photos
from pillsnap.runtime.images import decode_image

ROOT = Path(__file__).parents[1]
TINY = "--photos 30 --labels 2000 --scale 1 --size 48 --batch 2 --workers 1 --rounds 1 --part 28".split()
CONTENDERS = {
    "limit",
    "limit_without_workers",
    "hotset",
    "hotset_without_workers",
    "lmdb",
    "first_epoch",
    "uncached",
    "imagefolder",
}


def run(out: Path, *more: str) -> subprocess.CompletedProcess:
    """The command as `make bench-data` runs it."""
    command = [
        sys.executable,
        "-m",
        "pillsnap.bench.data.main",
        *TINY,
        "--out",
        str(out),
        "--labels-dir",
        str(out.parent),
        *more,
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """One run of everything."""
    out = tmp_path_factory.mktemp("bench") / "out"
    done = run(out)
    assert done.returncode == 0, done.stderr
    content = json.loads((out / "data.json").read_text(encoding="utf-8"))
    assert "hotset over imagefolder" in done.stdout and "data.json" in done.stdout
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"], "labels stay behind"
    assert sorted(path.name for path in out.iterdir()) == ["data.json", "photos", "scan"], (
        "caches or packed photos stay behind"
    )
    return content


def test_the_report_holds_everything(report: dict) -> None:
    installed = {name for name, peer in PEERS.items() if importlib.util.find_spec(peer.package)}
    assert set(report["images_per_second"]) == CONTENDERS | installed
    assert set(report["missing"]) == set(PEERS) - installed
    assert set(report) >= HEAD
    for name, value in goal_values(report).items():
        assert (
            value is None if any(peer in name for peer in report["missing"]) else math.isfinite(value) and value > 0
        ), name
    assert {
        "hotset_over_limit",
        "hotset_over_imagefolder",
        "uncached_over_imagefolder",
        "hotset_over_webdataset",
        "hotset_over_litdata",
        "first_epoch_over_uncached",
    } <= set(goal_values(report))
    values = [*report["images_per_second"].values(), report["labels_per_second_per_core"], report["peak_memory_mb"]]
    assert all(math.isfinite(value) and value > 0 for value in values)
    assert (
        report["machine"]["cores"] >= 1
        and report["versions"]["torch"]
        and report["setup"]["photos"] == 30
        and report["setup"]["photos_of_slow_ways"] == 28
    )


def test_ratios_come_from_the_rounds_of_the_report(report: dict) -> None:
    rounds = report["rounds"]
    assert all(len(values) == 1 for values in rounds.values())
    expected = np.median(np.array(rounds["hotset"]) / np.array(rounds["imagefolder"]))
    assert goal_values(report)["hotset_over_imagefolder"] == pytest.approx(expected, rel=0.01)


def test_labels_are_counted(report: dict) -> None:
    labels = report["labels"]
    assert (
        labels["labels"] == 2000
        and labels["unusable"] == 2
        and len(labels["seconds"]) == 1
        and labels["seconds_unchanged"] > 0
    )
    cores = labels["workers"]
    assert report["labels_per_second_per_core"] == pytest.approx(2000 / np.median(labels["seconds"]) / cores, rel=0.01)


def test_a_missing_peer_is_reported_with_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "litdata", None)
    assert "pip install 'pillsnap[bench]'" in why_missing(PEERS["litdata"])
    packed = []
    monkeypatch.setitem(
        loaders.PEERS,
        "webdataset",
        SimpleNamespace(package="json", pack=lambda *given: packed.append(given), stream=None),
    )
    contenders, missing = loaders._peer_contenders("workload", 3, tmp_path)
    assert (
        set(contenders) == {"webdataset"}
        and set(missing) == {"litdata"}
        and packed == [("workload", tmp_path / "webdataset")]
    )
    assert loaders.quotients({name: [1.0] for name in CONTENDERS})["hotset_over_litdata"] == []


def test_nothing_stays_behind_when_it_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(workload: object, options: object, work: Path) -> dict:
        (work / "cache").mkdir()
        raise BenchError("stopped on purpose")

    monkeypatch.setattr(loaders, "bench_loaders", fails)
    assert data.main([*TINY, "--labels", "20", "--out", str(tmp_path / "out"), "--labels-dir", str(tmp_path)]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["photos", "scan"]


def test_an_impossible_run_ends_with_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = [*TINY, "--labels", "20", "--out", str(tmp_path / "out"), "--labels-dir", str(tmp_path)]
    assert data.main([*words, "--photos", "8"]) == 2
    errors = capsys.readouterr().err
    sentences = [line for line in errors.splitlines() if " INFO " not in line]
    assert (
        len(sentences) == 1 and sentences[0].startswith("pillsnap: 8 photos are too few") and "Traceback" not in errors
    )
    assert data.main([*words, "--photos", "100000"]) == 2 and "64,800" in capsys.readouterr().err


def test_photos_are_written_once_and_an_interrupted_run_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [path.read_bytes() for path in write_photos(tmp_path / "whole", 6, scale=1, workers=1)]
    real, rendered = photos.draw_photo, []

    def stops(photo: object, seed: int) -> tuple:
        if len(rendered) == 4:
            raise KeyboardInterrupt
        rendered.append(photo)
        return real(photo, seed)

    monkeypatch.setattr(photos, "draw_photo", stops)
    with pytest.raises(KeyboardInterrupt):
        write_photos(tmp_path / "again", 6, scale=1, workers=1)
    monkeypatch.undo()
    assert [path.read_bytes() for path in write_photos(tmp_path / "again", 6, scale=1, workers=1)] == whole
    monkeypatch.setattr(photos, "_write_some", lambda *_: pytest.fail("a finished set is written again"))
    write_photos(tmp_path / "again", 6, scale=1, workers=1)


def test_photos_have_the_size_of_the_original(tmp_path: Path) -> None:
    paths = write_photos(tmp_path / "large", 3, workers=1)
    assert all(decode_image(path).shape == (1280, 976, 3) and 1.0e6 < path.stat().st_size < 1.9e6 for path in paths)
    with pytest.raises(BenchError, match="another size"):
        write_photos(tmp_path / "large", 3, scale=1, workers=1)


def test_a_folder_with_other_files_and_a_full_disk_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    precious = tmp_path / "other" / "precious.png"
    precious.parent.mkdir()
    precious.write_bytes(b"not ours")
    with pytest.raises(BenchError, match="no benchmark photos"):
        write_photos(precious.parent, 2, scale=1, workers=1)
    assert precious.read_bytes() == b"not ours" and len(plan_photos(2)) == 2
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(BenchError, match="--photos"):
        write_photos(tmp_path / "full", 2, scale=1, workers=1)
    with pytest.raises(BenchError, match="--labels"):
        synthetic_labels(tmp_path / "labels", 100, workers=1)
    assert not list((tmp_path / "labels").iterdir())
