"""The examples, run as their first lines say."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from debian import program
from PIL import Image
from serving import Running, running
from tiny_models import KEY, RIGHT, client_for, photo_jpeg, post_photo

from pillsnap.config.schema import Jobs, Settings
from pillsnap.scale.jobs.running import Runner, run_next
from pillsnap.scale.jobs.work import Models
from pillsnap.service.jobs.queue import open_queue

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A service with a worker beside it."""
    folder, over = tmp_path_factory.mktemp("server"), threading.Event()
    queue = open_queue(Jobs(), root=folder)
    runner = Runner(queue, Settings(), Models(models, Settings()))

    def work() -> None:
        while not over.wait(0.1):
            run_next(runner)

    thread = threading.Thread(target=work)
    with running(models, folder) as opened:
        thread.start()
        yield opened
        over.set()
        thread.join()


def run(*words: str) -> tuple[int, str, str]:
    variables = {**os.environ, "API_KEY": RIGHT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    (path := tmp_path / "photo.jpg").write_bytes(photo_jpeg())
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    with zipfile.ZipFile(path := tmp_path / "photos.zip", "w") as archive:
        archive.writestr("one.jpg", photo_jpeg())
        archive.writestr("two.jpg", b"no photo")
    return path


def test_client_in_python(server: Running, photo: Path, photos: Path) -> None:
    status, out, _ = run(sys.executable, "examples/predict.py", str(photo), server.url)
    assert status == 0 and out.startswith("K-000030 White round tablet 99%") and "K-000007" in out
    status, out, error = run(sys.executable, "examples/send_job.py", str(photos), server.url)
    assert status == 0 and out.splitlines()[0] == "one.jpg: K-000030" and out.splitlines()[1].startswith("two.jpg: ")
    status, _, error = run(sys.executable, "examples/send_job.py", str(photo), server.url)
    assert status == 1 and "no ZIP" in error and "Traceback" not in error


def test_client_in_python_without_a_service(photos: Path) -> None:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as other:  # which answers POST by a page of HTML
        threading.Thread(target=other.serve_forever, daemon=True).start()
        for port, reason in ((9, "does not answer"), (other.server_port, "is no pillsnap")):
            status, _, error = run(sys.executable, "examples/send_job.py", str(photos), f"http://127.0.0.1:{port}")
            assert status == 1 and reason in error and len(error.splitlines()) == 1
        other.shutdown()


def test_client_in_javascript(server: Running, photo: Path, photos: Path) -> None:
    node = program("node", "nodejs")
    status, out, error = run(node, "examples/client.js", server.url, str(photo))
    assert status == 0 and out.splitlines()[0].startswith("K-000030 White round tablet 99%"), error
    status, out, error = run(node, "examples/client.js", server.url, str(photos))
    assert status == 0 and out.splitlines()[0] == "one.jpg: K-000030" and len(out.splitlines()) == 2, error
    (empty := photos.with_name("empty.zip")).write_bytes(b"")
    status, _, error = run(node, "examples/client.js", server.url, str(empty))
    assert status == 1 and "no ZIP" in error and len(error.splitlines()) == 1


def test_flask_answers_like_the_service(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The photo of the form, and its pixels as JSON."""
    monkeypatch.setenv("MODEL_PATH", str(models))
    spec = importlib.util.spec_from_file_location("flask_app", ROOT / "examples" / "flask_app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    flask, data = module.app.test_client(), photo_jpeg()
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    Image.fromarray(pixels).save(png := io.BytesIO(), "PNG")
    with client_for(models) as service:
        for sent, same in (
            ({"data": {"image": (io.BytesIO(data), "photo.jpg")}}, data),
            ({"json": {"data": pixels.tolist()}}, png.getvalue()),
        ):
            answer = flask.post("/predict?pipeline=combo", **sent).get_json()
            expected = json.loads(post_photo(service, same, "?pipeline=combo", KEY).text)
            assert answer.pop("prediction") == ["K-000030", "K-000007"]
            assert {**answer, "timings_ms": 0} == {**expected, "timings_ms": 0}
    for sent, reason in (
        ({"data": {"image": (io.BytesIO(b"none"), "photo.jpg")}}, "image"),
        ({"json": {"data": [[1, 2], [3]]}}, "different lengths"),
        ({"json": {"data": [[[1.5, 2, 3]]]}}, "whole numbers"),
        ({"json": {"data": [[[300, 2, 3]]]}}, "above 255"),
        ({"json": []}, "data"),
        ({}, "Send a photo"),
    ):
        refused = flask.post("/predict", **sent)
        assert refused.status_code == 422 and reason in refused.get_json()["detail"]
