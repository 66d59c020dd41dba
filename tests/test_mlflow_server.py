"""Runs and registered models on a full MLflow server, in an environment of its own, and its page in Chromium."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.wait import WebDriverWait
from test_page import chromium, programs  # noqa: F401 - fixtures
from test_registered_kinds import register_quality
from test_tracking import losses, settings_with, short_run

from pillsnap.bench.registry.places import free_ports
from pillsnap.registry import follow
from pillsnap.registry.registered import choose, registered, weights_of
from pillsnap.registry.tracking import QUIET, open_tracking

VERSION = "3.17.2"  # of the image in compose.yaml
HOME = Path(sys.prefix) / "mlflow-server"  # made once: it is large, and not part of the project's environment


@pytest.fixture(scope="session")
def mlflow_python() -> Path:
    """The Python of an environment with the whole of MLflow; made where it is missing."""
    python = HOME / "bin" / "python"
    if not (HOME / "ready").is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(HOME)], check=True)
        quiet = ["-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        made = subprocess.run([str(python), *quiet, f"mlflow=={VERSION}"], capture_output=True, text=True)
        if made.returncode:
            advice = f"MLflow {VERSION} could not be installed into {HOME}: {made.stderr.strip()[-300:]}"
            (pytest.fail if os.environ.get("CI") else pytest.skip)(advice)
        (HOME / "ready").touch()
    return python


@pytest.fixture(scope="module")
def server(mlflow_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running server, started as compose.yaml starts it."""
    home, (port,) = tmp_path_factory.mktemp("mlflow"), free_ports(1)
    words = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    words += ["--backend-store-uri", f"sqlite:///{home / 'mlflow.db'}", "--serve-artifacts"]
    words += ["--artifacts-destination", str(home / "artifacts")]
    words += ["--allowed-hosts", f"127.0.0.1:{port},mlflow:{port}"]
    path = os.pathsep.join([str(mlflow_python.parent), os.environ["PATH"]])
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | QUIET | {"PATH": path}
    with (home / "server.log").open("w") as log:
        running = subprocess.Popen([str(mlflow_python), *words], stdout=log, stderr=log, cwd=home, env=clean)
    try:
        for _ in range(240):
            assert running.poll() is None, (home / "server.log").read_text()[-2000:]
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        else:
            raise AssertionError((home / "server.log").read_text()[-2000:])
        yield f"http://127.0.0.1:{port}"
    finally:
        running.terminate()
        running.wait(30)


def test_a_server_is_used_like_a_file(server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"tracking.url={server}"
    settings, resumed = settings_with(url), settings_with(url, "train.resume=last")
    with follow.tracked(settings, seconds=0.05):
        short_run(settings, tmp_path / "run", 3)
    with follow.tracked(resumed):
        short_run(resumed, tmp_path / "run", 5)
    tracking = open_tracking(settings)
    (found,) = tracking.client.search_runs([tracking.experiment])
    assert sorted(losses(tracking, found.info.run_id)) == [1, 2, 3, 4, 5] and found.info.status == "FINISHED"
    files = {file.path for file in tracking.client.list_artifacts(found.info.run_id)}
    assert {"config.yaml", "metrics.jsonl", "decisions.json"} <= files
    port = server.rpartition(":")[2]
    asked = [httpx.get(f"{server}/", headers={"host": f"{name}:{port}"}).status_code for name in ("mlflow", "other")]
    assert asked == [200, 403], "containers reach it by its name"
    place = [url, f"store.url={tmp_path / 'store'}", f"paths.cache_root={tmp_path / 'cache'}"]
    run = register_quality(capsys, place, tmp_path / "judge", 0.95)
    (version,) = registered(tracking, "quality")
    assert version.version == choose(tracking, "quality").version and version.run_id in version.source
    assert weights_of(version) == f"{(tmp_path / 'store').as_uri()}/models/quality/v1" and run.is_dir()


def test_its_page_shows_runs_and_registered_models(
    server: str,
    chromium: WebDriver,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url = f"tracking.url={server}"
    settings = settings_with(url, "tracking.experiment=page")
    with follow.tracked(settings):
        short_run(settings, tmp_path / "a run of the page", 20)
    tracking = open_tracking(settings)
    (found,) = tracking.client.search_runs([tracking.experiment])
    place = [url, f"store.url={tmp_path / 'store'}", f"paths.cache_root={tmp_path / 'cache'}"]
    register_quality(capsys, place, tmp_path / "judge", 0.97)
    show(chromium, f"{server}/#/experiments/{tracking.experiment}/runs", lambda text: "a run of the page" in text)
    runs = f"{server}/#/experiments/{tracking.experiment}/runs/{found.info.run_id}"
    show(chromium, runs, lambda text: "git_revision" in text and "classifier/loss" in text)
    show(chromium, f"{server}/#/models/pillsnap-quality", lambda text: "champion" in text.lower())
    picture = tmp_path / "models.png"
    assert chromium.save_screenshot(str(picture)) and Image.open(picture).width > 800


def show(browser: WebDriver, address: str, ready: Callable[[str], bool]) -> None:
    """Open a page and wait for its text."""
    browser.set_window_size(1280, 900)
    browser.get("about:blank")
    browser.get(address)
    WebDriverWait(browser, 60).until(lambda opened: ready(opened.find_element(By.TAG_NAME, "body").text))
