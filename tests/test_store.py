"""The model store on a disk, on S3 and in lakeFS: unique numbers, atomic versions, one sentence per error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pillsnap.bench.registry.places import free_ports, s3_keys, seaweedfs
from pillsnap.cli import main
from pillsnap.registry.objects import Change, StoreError
from pillsnap.registry.store import ModelStore, list_versions, numbers, open_store, task_folder, tasks
from pillsnap.registry.versions import promote, promoted, pull, push, rollback


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """SeaweedFS on the loopback, with two users, without telemetry."""
    with seaweedfs(tmp_path_factory.mktemp("s3") / "server") as endpoint:
        yield endpoint


def as_user(patch: pytest.MonkeyPatch, endpoint: str, name: str) -> None:
    """Set endpoint and credentials in the environment."""
    for key, value in s3_keys(endpoint, name).items():
        patch.setenv(key, value)


@pytest.fixture(params=["disk", "s3", "lakefs"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelStore:
    """An empty store."""
    if request.param == "disk":
        return open_store(tmp_path / "a store", writing=True)
    if request.param == "lakefs":
        return open_store(f"{request.getfixturevalue('lakefs_repository')}/main/{tmp_path.name}", writing=True)
    as_user(monkeypatch, request.getfixturevalue("s3_endpoint"), "writer")
    return open_store(f"s3://team/{tmp_path.name}", writing=True)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Two files of a version; the larger one takes a multipart upload."""
    model, report = tmp_path / "model.onnx", tmp_path / "report.json"
    model.write_bytes(os.urandom(12_000_000))
    report.write_text("{}")
    return {"model.onnx": model, "report.json": report}


def test_push_promote_and_pull(store: ModelStore, files: dict[str, Path], tmp_path: Path):
    assert push(store, "classifier", files, "the first").number == 1
    assert push(store, "classifier", {"report.json": files["report.json"]}).number == 2
    assert push(store, "detector", files).number == 1
    assert tasks(store) == ["classifier", "detector"] and numbers(store, "classifier") == [1, 2]
    assert [version.note for version in list_versions(store, "classifier")] == ["the first", ""]
    promote(store, "classifier", 1)
    folder = pull(store, "classifier", None, tmp_path / "cache")
    assert (folder / "model.onnx").read_bytes() == files["model.onnx"].read_bytes()
    before = (folder / "model.onnx").stat().st_mtime_ns
    assert (
        pull(store, "classifier", 1, tmp_path / "cache") == folder
        and (folder / "model.onnx").stat().st_mtime_ns == before
    ), "an undamaged file is not downloaded again"


def test_concurrent_writers_get_unique_numbers(store: ModelStore, files: dict[str, Path]):
    with ThreadPoolExecutor(8) as pool:
        pushed = list(
            pool.map(
                lambda number: push(store, "classifier", {"report.json": files["report.json"]}, f"writer {number}"),
                range(16),
            )
        )
    assert sorted(version.number for version in pushed) == list(range(1, 17))
    assert {version.number: version.note for version in list_versions(store, "classifier")} == {
        version.number: version.note for version in pushed
    }


def test_promote_and_rollback(store: ModelStore, files: dict[str, Path]):
    for _ in range(3):
        push(store, "classifier", {"report.json": files["report.json"]})
    assert promoted(store, "classifier") is None
    for number in (1, 3, 2):
        promote(store, "classifier", number)
    assert [rollback(store, "classifier"), rollback(store, "classifier")] == [3, 1]
    with pytest.raises(StoreError, match="No other classifier was promoted before"):
        rollback(store, "classifier")
    with pytest.raises(StoreError, match="There is no v4 of classifier .* it has v1, v2, v3"):
        promote(store, "classifier", 4)


def test_damaged_model_is_not_pulled(store: ModelStore, files: dict[str, Path], tmp_path: Path):
    push(store, "classifier", files)
    data = bytearray(files["model.onnx"].read_bytes())
    data[1000] ^= 1
    with store.objects.change("damage", {}) as change:
        change.write("models/classifier/v1/model.onnx", bytes(data))
    with pytest.raises(StoreError, match="its hash is not the one that it was pushed with"):
        pull(store, "classifier", 1, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*model*"))


KILLED = """
import os, signal, sys
from pathlib import Path
from pillsnap.registry import versions
from pillsnap.registry.store import open_store
upload = versions._upload
def killed(change, path, place):
    if place.endswith("report.json"):
        os.kill(os.getpid(), signal.SIGKILL)
    return upload(change, path, place)
versions._upload = killed
files = {"model.onnx": Path(sys.argv[2]), "report.json": Path(sys.argv[3])}
versions.push(open_store(sys.argv[1]), "classifier", files)
"""


def test_killed_push_is_no_version(store: ModelStore, files: dict[str, Path], tmp_path: Path):
    push(store, "classifier", files)
    ended = subprocess.run([sys.executable, "-c", KILLED, store.url, *map(str, files.values())])
    assert ended.returncode == -signal.SIGKILL
    assert numbers(store, "classifier") == [1, 2] and [
        version.number for version in list_versions(store, "classifier")
    ] == [1]
    with pytest.raises(StoreError, match="There is no v2 of classifier"):
        pull(store, "classifier", 2, tmp_path / "cache")
    assert push(store, "classifier", files).number == 3


def test_failed_push_leaves_no_files(store: ModelStore, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    from pillsnap.registry import versions as module

    upload = module._upload

    def fails(change: Change, path: Path, place: str) -> dict:
        if place.endswith("report.json"):
            raise OSError(28, "No space left on device")
        return upload(change, path, place)

    monkeypatch.setattr(module, "_upload", fails)
    with pytest.raises(StoreError, match="Pushing a classifier failed at .*No space left on device"):
        push(store, "classifier", files)
    assert {path.rpartition("/")[2] for path in store.objects.files("models")} <= {"claim.json"}


def test_a_failed_push_takes_back_the_list_of_its_files_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import obstore

    objects, deleted = open_store(tmp_path, writing=True).objects, list[str]()
    monkeypatch.setattr(obstore, "delete", lambda place, path: deleted.append(path))
    with pytest.raises(RuntimeError), objects.change("a push", {}) as change:
        change.write("model.onnx", b"weights")
        change.write("version.json", b"{}")
        raise RuntimeError("interrupted")
    assert deleted == ["version.json", "model.onnx"]


def test_names_of_tasks_are_told_apart_in_tags_of_lakefs():
    with pytest.raises(StoreError, match="'a--b' is no name of a task"):
        task_folder("a--b")


def test_reader_cannot_write(s3_endpoint: str, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    as_user(monkeypatch, s3_endpoint, "writer")
    push(open_store(f"s3://team/{tmp_path.name}"), "classifier", files)
    as_user(monkeypatch, s3_endpoint, "reader")
    store = open_store(f"s3://team/{tmp_path.name}")
    assert pull(store, "classifier", 1, tmp_path / "cache").is_dir()
    with pytest.raises(StoreError, match="Pushing a classifier failed at s3://team") as caught:
        push(store, "classifier", files)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_missing_store_gives_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    as_user(monkeypatch, f"http://127.0.0.1:{free_ports(1)[0]}", "writer")
    with pytest.raises(StoreError, match="Reading the list of models failed at s3://team/models") as caught:
        tasks(open_store("s3://team/models"))
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)
    (tmp_path / "a file").write_text("no folder")
    with pytest.raises(StoreError, match="can't be opened"):
        open_store(tmp_path / "a file" / "store", writing=True)


def test_command_pushes_promotes_and_pulls(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    place = f"store.url={tmp_path / 'store'}"
    assert main(["export", "--run", str(trained_run)]) == 0
    capsys.readouterr()
    assert main(["models", "push", "--run", str(trained_run), "--note", "smoke", place]) == 0, capsys.readouterr().err
    assert (
        main(["models", "promote", "classifier", "1", place]) == 0
        and main(["models", "promote", "detector", "1", place]) == 0
    )
    assert (
        main(["models", "pull", "--out", str(tmp_path / "served"), place, f"paths.cache_root={tmp_path / 'cache'}"])
        == 0
    ), capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "served").iterdir()) == ["classifier.onnx", "detector.onnx"]
    capsys.readouterr()
    assert main(["models", "list", place]) == 0
    assert capsys.readouterr().out.count("smoke") == 2
    assert main(["models", "info", str(tmp_path / "served" / "classifier.onnx")]) == 0
    assert json.loads(capsys.readouterr().out)["model_type"] == "classifier"
    for arguments, sentence in (
        (["show", "classifier", "9"], "There is no v9"),
        (["promote", "classifier"], "Name which version"),
        (["promote", "classifier", "two"], "'two' is no version"),
        (["rollback", "classifier"], "No other classifier"),
    ):
        assert main(["models", *arguments, place]) == 2 and sentence in capsys.readouterr().err
