"""lakeFS as a store: addresses that never change, commits that are whole, and one sentence for what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pillsnap.registry.objects import StoreError
from pillsnap.registry.store import list_versions, numbers, open_store
from pillsnap.registry.versions import open_address, promote, promoted, pull, push, version_address


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(os.urandom(100_000))
    return path


def test_an_address_names_the_same_bytes_after_the_branch_has_moved(
    lakefs_repository: str, weights: Path, tmp_path: Path
):
    store = open_store(f"{lakefs_repository}/main/team")
    version = push(store, "classifier", {"model.onnx": weights}, "the first")
    address, before = version_address(store, version), weights.read_bytes()
    assert address.startswith(f"{lakefs_repository}/") and "/main/" not in address
    weights.write_bytes(b"other weights")
    for _ in range(3):
        push(store, "classifier", {"model.onnx": weights})
    with store.objects.change("overwrite", {}) as change:
        change.write("models/classifier/v1/model.onnx", b"overwritten")
    there, task, number = open_address(address)
    assert (pull(there, task, number, tmp_path / "cache") / "model.onnx").read_bytes() == before
    assert len(list_versions(there, task)) == 1 and len(list_versions(store, task)) == 4
    with pytest.raises(StoreError, match="its hash is not the one"):
        pull(store, "classifier", 1, tmp_path / "other cache")


def test_each_push_of_an_open_store_has_its_own_address(lakefs_repository: str, weights: Path, tmp_path: Path):
    store, found = open_store(f"{lakefs_repository}/main"), []
    for number in range(3):
        weights.write_bytes(f"weights {number}".encode())
        found.append(version_address(store, push(store, "classifier", {"model.onnx": weights})))
    for number, address in enumerate(found):
        kept = pull(*open_address(address), tmp_path / "cache") / "model.onnx"
        assert kept.read_text() == f"weights {number}"
    assert len(set(found)) == 3
    first, second = (push(store, "detector", {"model.onnx": weights}) for _ in range(2))
    there, _, _ = open_address(version_address(store, first))
    assert len(list_versions(there, "detector")) == 1, "its own commit, whatever was pushed until it was asked for"
    assert version_address(store, second) != version_address(store, first)


def test_a_push_is_a_commit_with_metadata(lakefs_repository: str, weights: Path):
    import lakefs

    store = open_store(f"{lakefs_repository}/main")
    push(store, "detector", {"model.onnx": weights}, "why it was pushed")
    branch = lakefs.Repository(lakefs_repository.removeprefix("lakefs://"), lakefs.Client()).branch("main")
    commit = next(iter(branch.log(max_amount=1)))
    facts = {"task": "detector", "version": "1", "note": "why it was pushed"}
    assert commit.message == "Push detector v1" and facts.items() <= commit.metadata.items()


def test_the_clients_own_branches_differences_merges_and_deletions(lakefs_repository: str):
    import lakefs

    repository = lakefs.Repository(lakefs_repository.removeprefix("lakefs://"), lakefs.Client())
    main = repository.branch("main")
    side = repository.branch("side").create(source_reference="main")
    for name in ("a.txt", "b.txt", "c/d.txt"):
        side.object(f"some/{name}").upload(name.encode(), mode="wb")
    side.commit("Three files", metadata={"why": "a test"})
    assert {one.id for one in repository.branches()} == {"main", "side"}
    assert {(one.type, one.path) for one in main.diff(other_ref=side)} == {
        ("added", f"some/{name}") for name in ("a.txt", "b.txt", "c/d.txt")
    }
    side.merge_into(main)
    assert not list(main.diff(other_ref=side))
    listed = [one.path for one in main.objects(prefix="some/", delimiter="/")]
    assert listed == ["some/a.txt", "some/b.txt", "some/c/"], "a folder is one entry"
    main.object("some/a.txt").delete()
    main.delete_objects(["some/b.txt"])
    kept = repository.tag("before").create(main.head.id)
    main.commit("Two files less")
    assert [one.path for one in main.objects(prefix="some/")] == ["some/c/d.txt"]
    assert kept.object("some/a.txt").reader(mode="rb").read() == b"a.txt", "a tag keeps them"
    reader = kept.object("some/c/d.txt").reader(mode="rb", pre_sign=False)
    reader.seek(2)
    assert reader.read(3) == b"d.t"
    repository.branch("side").delete()
    assert {one.id for one in repository.branches()} == {"main"}


def test_what_is_uploaded_and_not_committed_is_not_read(lakefs_repository: str, weights: Path):
    import lakefs

    store = open_store(f"{lakefs_repository}/main")
    push(store, "classifier", {"model.onnx": weights})
    branch = lakefs.Repository(lakefs_repository.removeprefix("lakefs://"), lakefs.Client()).branch("main")
    branch.object("models/classifier/v9/version.json").upload(b"{}", mode="wb")
    assert numbers(store, "classifier") == [1]
    with pytest.raises(StoreError, match=r"Pushing a classifier failed .* uncommitted changes"):
        push(store, "classifier", {"model.onnx": weights})


def test_large_files_are_read_in_ranges(lakefs_repository: str, tmp_path: Path):
    (tmp_path / "large").write_bytes(data := os.urandom(20_000_000))
    store = open_store(f"{lakefs_repository}/main")
    push(store, "classifier", {"large": tmp_path / "large"})
    pieces = list(store.objects.pieces("models/classifier/v1/large"))
    assert len(pieces) == 3 and b"".join(pieces) == data


def test_long_lists_have_pages(lakefs_repository: str, tmp_path: Path):
    store = open_store(f"{lakefs_repository}/main")
    files = {f"photos/{number:04d}.txt": tmp_path / "one" for number in range(130)}
    (tmp_path / "one").write_text("1")
    push(store, "data", files)
    assert len(store.objects.files("models/data/v1")) == 131


PUSHED = """
import sys
from pathlib import Path
from pillsnap.registry.store import open_store
from pillsnap.registry.versions import push
print(push(open_store(sys.argv[1]), "classifier", {"model.onnx": Path(sys.argv[2])}).number)
"""


def test_eight_processes_lose_nothing(lakefs_repository: str, weights: Path, tmp_path: Path):
    command = [sys.executable, "-c", PUSHED, f"{lakefs_repository}/main/team", str(weights)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    assert sorted(int(process.communicate(timeout=120)[0]) for process in running) == list(range(1, 9))
    store = open_store(f"{lakefs_repository}/main/team")
    assert [version.number for version in list_versions(store, "classifier")] == list(range(1, 9))
    promote(store, "classifier", 8)
    assert promoted(store, "classifier") == 8


def test_bad_addresses_and_keys_are_one_sentence(
    lakefs_repository: str, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import lakefs

    store = open_store(f"{lakefs_repository}/main")
    version = push(store, "classifier", {"model.onnx": weights})
    address = version_address(store, version)
    repository = lakefs.Repository(lakefs_repository.removeprefix("lakefs://"), lakefs.Client())
    repository.branch("old").create("main")
    old = open_store(f"{lakefs_repository}/old")
    repository.branch("old").delete()
    commit = address.split("/")[3]

    def refused(call: Callable[[], object], sentence: str) -> None:
        with pytest.raises(StoreError, match=sentence) as caught:
            call()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400

    files = {"model.onnx": weights}
    refused(lambda: open_store(lakefs_repository), "is no address in lakeFS: write lakefs://repository/reference/path")
    refused(lambda: open_store("lakefs://nowhere-at-all/main"), "can't be opened .*not found")
    refused(lambda: open_store(f"{lakefs_repository}/old"), "can't be opened .*not found")
    refused(lambda: push(old, "classifier", files), "old@ not found")
    refused(lambda: open_address(address.replace(commit, "0" * 64)), "can't be opened .*not found")
    refused(lambda: push(open_store(f"{lakefs_repository}/{commit}"), "classifier", files), "names no branch")
    monkeypatch.setenv("LAKECTL_CREDENTIALS_SECRET_ACCESS_KEY", "wrong")
    refused(lambda: open_store(f"{lakefs_repository}/main"), "can't be opened .*authenticat")
    monkeypatch.setenv("LAKECTL_SERVER_ENDPOINT_URL", "http://127.0.0.1:9")
    refused(lambda: open_store(f"{lakefs_repository}/main"), "can't be opened .*Connection refused")
    monkeypatch.delenv("LAKECTL_CREDENTIALS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("LAKECTL_CONFIG_FILE", str(tmp_path / "none.yaml"))
    refused(lambda: open_store(f"{lakefs_repository}/main"), "The keys of lakeFS are missing")
    assert [version.number for version in list_versions(store, "classifier")] == [1]
