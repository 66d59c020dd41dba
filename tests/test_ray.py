"""Ray on two nodes: the same files as on one machine, and nothing lost or there twice, whatever is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import polars as pl
import pytest
from tiny_models import photo_jpeg, save_classifier, save_detector, save_quality

from pillsnap.answer.gallery.gallery_file import GALLERY_FILE, read_gallery
from pillsnap.bench.scale.network import NotPermitted, call
from pillsnap.bench.scale.nodes import Nodes
from pillsnap.color.networks.files import model_content
from pillsnap.color.networks.nilut import Nilut
from pillsnap.config.load import load_settings, settings_as_yaml
from pillsnap.config.schema import Settings
from pillsnap.export.report import export_run
from pillsnap.training.checkpoint import save_checkpoint

ROOT = Path(__file__).parents[1]
CONFIG = str(ROOT / "config.yaml")
PHOTOS = 320


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """A head; tests add the second node."""
    try:
        opened = Nodes(tmp_path_factory.mktemp("nodes"))
    except NotPermitted as error:
        pytest.skip(str(error))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models and photos, one of which is damaged, and one empty."""
    folder = tmp_path_factory.mktemp("asked")
    for name in ("models", "photos"):
        (folder / name).mkdir()
    save_classifier(folder / "models")
    save_detector(folder / "models")
    different = [photo_jpeg(0.6 + number / 20) for number in range(8)]
    for number in range(PHOTOS):
        (folder / "photos" / f"{number:04d}.jpg").write_bytes(different[number % 8])
    (folder / "photos" / "0005.jpg").write_bytes(different[0][:300])
    (folder / "photos" / "0007.jpg").write_bytes(b"")
    return folder


def predict(asked: Path, out: Path, engine: str = "ray", photos: str = "photos") -> list[str]:
    """Words of the command."""
    models = ["--model", str(asked / "models"), "--cfg", CONFIG]
    return ["pillsnap", "predict", str(asked / photos), *models, "--out", str(out), "--engine", engine]


@pytest.fixture(scope="module")
def answers(nodes: Nodes, asked: Path, tmp_path_factory: pytest.TempPathFactory) -> pl.DataFrame:
    """What processes of this machine answer."""
    out = tmp_path_factory.mktemp("local") / "answers.parquet"
    report = json.loads(nodes.run(*predict(asked, out, "local"), status=1)[0])
    assert (report["photos"], report["errors"]) == (PHOTOS, 2)
    return pl.read_parquet(out)


def alike(left: Any, right: Any) -> bool:
    """Equal JSON, but for the last digits of its numbers."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(alike(left[name], right[name]) for name in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(alike, left, right))
    return abs(left - right) <= 1e-5 if isinstance(left, float) else left == right


def check_answers(out: Path, expected: pl.DataFrame) -> None:
    """The same photos in the same order, with the same answers."""
    found = pl.read_parquet(out)
    close = ["photo", "error", "pills", "code", "name", "verdict"]
    assert found[close].equals(expected[close])
    assert np.allclose(found["confidence"].fill_null(0), expected["confidence"].fill_null(0), atol=1e-5)
    assert all(alike(*map(json.loads, pair)) for pair in zip(found["answer"], expected["answer"]) if all(pair))
    assert found["answer"].is_null().equals(expected["answer"].is_null())
    assert not out.with_name(f"{out.stem}.parts").exists()


def files_of(folder: Path) -> dict[str, bytes]:
    """Contents by name; a report has its seconds and its place."""
    paths = (path for path in folder.rglob("*") if path.is_file() and "report" not in path.name)
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def filled(nodes: Nodes, tiny_settings: Callable[..., Settings], tmp_path_factory: pytest.TempPathFactory):
    """A function that scans and fills a cache with an engine; returns the files."""
    base = tmp_path_factory.mktemp("filled")
    settings = tiny_settings("data.cache=hotset")
    (base / "settings.yaml").write_text(settings_as_yaml(settings))

    def fill(name: str, engine: str, *more: str) -> dict[str, bytes]:
        given = ["--cfg", str(base / "settings.yaml"), "--engine", engine]
        nodes.run("pillsnap", "cache", "build", *given, f"paths.cache_root={base / name}", *more)
        return files_of(base / name)

    return fill


@pytest.fixture(scope="module")
def local_files(filled) -> dict[str, bytes]:
    """What processes of this machine write."""
    return filled("local", "local")


def test_one_node_writes_the_same_files(filled, local_files):
    assert len(local_files) > 6 and any(name.endswith(".pixels") for name in local_files)
    assert filled("one", "ray") == local_files


def test_two_nodes_write_the_same_files(nodes, filled, local_files):
    nodes.add()
    assert filled("two", "ray") == local_files


def test_two_nodes_scan_the_same(nodes, tiny_data, tmp_path):
    written = []
    for engine in ("local", "ray"):
        out = ["--out", str(tmp_path / engine / "manifest.parquet"), "--engine", engine]
        nodes.run("pillsnap", "scan", "--data-root", str(tiny_data), "--cfg", CONFIG, *out)
        written.append(files_of(tmp_path / engine))
    assert written[0] == written[1] and "manifest.parquet" in written[0]


def test_two_nodes_put_the_same_crops_into_lmdb(filled, tmp_path):
    found = []
    for engine in ("local", "ray"):
        content = {}
        for name, data in filled(f"lmdb {engine}", engine, "data.cache=lmdb").items():
            if name.endswith("data.mdb"):
                (copy := tmp_path / engine / str(len(content))).mkdir(parents=True)
                (copy / "data.mdb").write_bytes(data)
                with lmdb.open(str(copy)) as environment, environment.begin() as transaction:
                    content[Path(name).parent.name] = dict(transaction.cursor())
        found.append(content)
    assert found[0] == found[1] and sum(map(len, found[0].values())) > 20


@pytest.mark.parametrize("source", ["photos.zip", "photos.parquet"])
def test_two_nodes_answer_archives_and_manifests(nodes, asked, tmp_path, source):
    photos = sorted((asked / "photos").iterdir())[:40]
    with zipfile.ZipFile(asked / "photos.zip", "w") as archive:
        for photo in photos:
            archive.write(photo, photo.name)
    pl.DataFrame({"image": [*map(str, reversed(photos))]}).write_parquet(asked / "photos.parquet")
    for engine in ("local", "ray"):
        nodes.run(*predict(asked, tmp_path / f"{engine}.parquet", engine, source), status=1)
    expected = pl.read_parquet(tmp_path / "local.parquet")
    assert len(expected) == 40 and expected["error"].is_not_null().sum() == 2
    check_answers(tmp_path / "ray.parquet", expected)


def test_a_node_with_other_models_is_refused(nodes, asked, tmp_path):
    for name in ("models", "other"):
        shutil.copytree(asked / "models", tmp_path / name)
    save_classifier(tmp_path / "other", embeddings=True)
    (tmp_path / "photos").symlink_to(asked / "photos")
    on_node = ["nsenter", "--target", str(nodes.network.pids(1)[0]), "--mount"]  # it sees another folder there
    call(*on_node, "mount", "--bind", str(tmp_path / "other"), str(tmp_path / "models"))
    _, log = nodes.run(*predict(tmp_path, tmp_path / "answers.parquet"), status=2)
    call(*on_node, "umount", str(tmp_path / "models"))
    assert f"A node has other models in {tmp_path / 'models'}" in log and "Traceback" not in log


def test_two_nodes_give_the_same_answers(nodes, asked, answers, tmp_path):
    printed, log = nodes.run(*predict(asked, tmp_path / "answers.parquet"), status=1)
    assert json.loads(printed)["answered_now"] == PHOTOS and "2 nodes" in log
    check_answers(tmp_path / "answers.parquet", answers)


def test_two_nodes_build_the_same_gallery(nodes, trained_run, tiny_data, tmp_path):
    export_run(trained_run, load_settings(trained_run / "config.yaml"))
    built = []
    for engine in ("local", "ray"):
        models = tmp_path / engine
        shutil.copytree(trained_run / "export", models)
        words = ["--model", str(models), "--cfg", str(trained_run / "config.yaml"), "--data-root", str(tiny_data)]
        nodes.run("pillsnap", "gallery", "build", *words, "--per-side", "2", "--engine", engine)
        built.append(read_gallery(models / GALLERY_FILE))
    local, spread = (
        [(item.codes, item.side, item.picture, item.photo) for item in gallery.references] for gallery in built
    )
    assert len(local) == 12 and local == spread
    vectors = [np.stack([item.embedding for item in gallery.references]) for gallery in built]
    assert np.allclose(*vectors, atol=1e-5)


def test_two_nodes_give_the_same_grades(nodes, tiny_data, tmp_path):
    save_quality(tmp_path)
    words = ["--data-root", str(tiny_data), "--model", str(tmp_path / "quality.onnx"), "--cfg", CONFIG]
    words.append(f"paths.cache_root={tmp_path / 'cache'}")
    local, spread = (
        nodes.run("pillsnap", "quality", "grade", *words, "--engine", engine)[0] for engine in ("local", "ray")
    )
    assert local == spread and len(local.splitlines()) > 20


def test_two_nodes_give_the_same_pictures(nodes, asked, tmp_path):
    style = Nilut(("warm", "cold"), (16,))
    save_checkpoint(model_content(style, {"data_type": "cube", "before": "none"}), tmp_path / "best.pt")
    (few := tmp_path / "few").mkdir()
    for path in sorted((asked / "photos").iterdir())[:24]:
        shutil.copy(path, few)
    pictures = []
    for engine in ("local", "ray"):
        out = tmp_path / engine
        words = ["--photos", str(few), "--model", str(tmp_path / "best.pt"), "--out", str(out)]
        words += ["--style", "warm", "--engine", engine, "--cfg", CONFIG]
        report = json.loads(nodes.run("pillsnap", "color", "apply", *words, status=1)[0])
        assert report["written_now"] == 22
        assert sorted(report["errors"]) == [str(few / f"000{number}.jpg") for number in (5, 7)]
        pictures.append(files_of(out))
    local, spread = pictures
    assert local == spread and len(local) == 23 and "0000-warm.png" in local  # one of them is colors.json


def test_a_killed_command_goes_on(nodes, asked, answers, tmp_path):
    out = tmp_path / "answers.parquet"
    process = nodes.start(*predict(asked, out))
    end = time.monotonic() + 60
    while not list((tmp_path / "answers.parts").glob("0*.parquet")) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not out.exists()
    report = json.loads(nodes.run(*predict(asked, out), status=1)[0])
    assert report["photos"] == PHOTOS and 0 < report["answered_now"] < PHOTOS
    check_answers(out, answers)


def test_another_version_is_refused(nodes, asked, tmp_path):
    shutil.copytree(ROOT / "pillsnap", tmp_path / "other" / "pillsnap", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "other" / "pillsnap" / "__init__.py").write_text('__version__ = "0.9.0"\n')
    words = predict(asked, tmp_path / "answers.parquet")
    _, log = nodes.run(*words, status=2, PYTHONPATH=str(tmp_path / "other"))
    assert "this machine has 0.9.0" in log and "install the same version on every node" in log
    assert "Traceback" not in log and not (tmp_path / "answers.parquet").exists()


def test_a_node_with_a_full_disk_is_left_out(nodes, asked, answers, tmp_path):
    disk = nodes.temporary(1)
    rest = shutil.disk_usage(disk).free - 8 * 2**20
    (disk / "filled").write_bytes(bytes(rest))
    try:
        _, log = nodes.run(*predict(asked, tmp_path / "answers.parquet"), status=1)
    finally:
        (disk / "filled").unlink()
    assert f"{nodes.network.addresses[1]} has less than 32 MB free" in log and "a node is left out" in log
    check_answers(tmp_path / "answers.parquet", answers)


def test_a_killed_worker_and_a_killed_node_lose_nothing(nodes, asked, answers, tmp_path):
    """The last test with two nodes."""
    process = nodes.start(*predict(asked, tmp_path / "answers.parquet"))
    os.kill(nodes.wait_for_worker(0), signal.SIGKILL)
    nodes.wait_for_worker(1)
    nodes.network.kill(1)
    printed, log = process.communicate(timeout=240)
    assert process.returncode == 1, log[-3000:]
    assert json.loads(printed)["answered_now"] == PHOTOS and "a block is asked for again" in log
    check_answers(tmp_path / "answers.parquet", answers)


def test_a_lost_head_is_one_sentence(nodes, asked, tmp_path):
    """The last test with a head."""
    words = predict(asked, tmp_path / "answers.parquet")
    words[2:2] = [str(asked / "photos")] * 20  # half a minute of work
    process = nodes.start(*words)
    nodes.wait_for_worker(0)
    [head] = [pid for pid in nodes.network.pids(0) if b"gcs_server" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(head, signal.SIGKILL)
    started = time.monotonic()
    _, log = process.communicate(timeout=60)
    assert process.returncode == 2 and "is lost: start it and this command again" in log and "Traceback" not in log, (
        log[-3000:]
    )
    assert time.monotonic() - started < 30


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port where something listens that says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("kind", ["nothing", "silent", "client", "nonsense"])
def test_an_address_without_a_ray_is_one_sentence(kind, silent_port, asked, tmp_path):
    address = {"nothing": "127.0.0.1:9", "silent": f"127.0.0.1:{silent_port}", "client": "ray://127.0.0.1:10001"}
    environment = {**os.environ, "RAY_ADDRESS": address.get(kind, "somewhere"), "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", *predict(asked, tmp_path / "answers.parquet")]
    started = time.monotonic()
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=60)
    said = [line for line in done.stderr.splitlines() if line.startswith("pillsnap: ")]
    assert done.returncode == 2 and len(said) == 1 and "RAY" in said[0].upper() and "Traceback" not in done.stderr
    assert time.monotonic() - started < 20
