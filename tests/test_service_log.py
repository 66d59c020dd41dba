"""The log of the service: one format, one file for many processes that may be moved or full, no private data."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from pillsnap.config.environment import Environment, load_environment
from pillsnap.config.schema import SettingsError
from pillsnap.service.logging import Console, LogFile, setup_service_logging

ROOT = Path(__file__).parents[1]
APP = """
import logging
from contextlib import asynccontextmanager
from pathlib import Path
from asgi_correlation_id import CorrelationIdMiddleware
from fastapi import FastAPI, Request
from pillsnap.config.environment import load_environment
from pillsnap.service.logging import AccessLog, setup_service_logging
from pillsnap.service.errors import ApiError, add_error_handlers

@asynccontextmanager
async def lifespan(app):
    setup_service_logging(load_environment(Path.cwd()))
    yield

app = FastAPI(lifespan=lifespan)
app.add_middleware(AccessLog)
app.add_middleware(CorrelationIdMiddleware)
add_error_handlers(app)

@app.post("/predict")
async def predict(request: Request):
    request.state.key_name = "c16678f8"
    return {"bytes": len(await request.body())}

@app.get("/fails")
async def fails():
    raise RuntimeError("a defect")

@app.get("/refuses")
async def refuses():
    raise ApiError(403, "key_wrong", "The API key is wrong.")
"""


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    """Restore the loggers after each test."""
    known = [logging.getLogger(name) for name in (None, "pillsnap", "uvicorn", "uvicorn.error", "uvicorn.access")]
    before = [(logger, list(logger.handlers), logger.level, logger.propagate) for logger in known]
    yield
    for logger, handlers, level, propagate in before:
        logger.handlers[:], logger.level, logger.propagate = handlers, level, propagate


def serve(folder: Path, *options: str, **variables: str) -> tuple[subprocess.Popen, str]:
    """Start a real uvicorn with the app above; returns its process and address."""
    (folder / "little.py").write_text(APP)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{folder}", "PYTHONUNBUFFERED": "1", **variables}
    process = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "little:app", "--port", str(port), *options],
        cwd=folder,
        env=environment,
        stderr=(folder / "stderr").open("w"),
    )
    ends = time.monotonic() + 60
    while True:
        try:
            httpx.get(f"http://127.0.0.1:{port}/nothing", timeout=5)
            return process, f"http://127.0.0.1:{port}"
        except httpx.HTTPError:
            assert process.poll() is None and time.monotonic() < ends, (folder / "stderr").read_text()
            time.sleep(0.1)


def stop(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGINT)
    process.wait(30)


def test_every_line_of_a_server_is_json_without_private_data(tmp_path: Path) -> None:
    process, url = serve(tmp_path, LOG_FILE=str(tmp_path / "logs" / "service.log"))
    try:
        good = httpx.post(
            f"{url}/predict?pipeline=combo",
            headers={"X-API-Key": "a-secret-key"},
            files={"image": ("my-knee.jpg", b"GPS 37.5 127.0")},
        )
        failed, refused, strange = (
            httpx.get(f"{url}/fails"),
            httpx.get(f"{url}/refuses"),
            httpx.get(f"{url}/{'x' * 3000}%0D%0Aline%22"),
        )
        assert [response.status_code for response in (good, failed, refused, strange)] == [200, 500, 403, 404]
    finally:
        stop(process)
    text = (tmp_path / "logs" / "service.log").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert all({"time", "level", "message", "request_id"} <= set(line) for line in lines)
    assert not any(
        word in text + (tmp_path / "stderr").read_text() for word in ("combo", "secret", "knee", "GPS", "color_message")
    )
    requests = {line["request_id"]: line for line in lines if "status" in line}
    assert "127.0.0.1" not in json.dumps(list(requests.values())), "no client has an address"
    for response, method, path in ((good, "POST", "/predict"), (failed, "GET", "/fails"), (refused, "GET", "/refuses")):
        line = requests[response.headers["x-request-id"]]
        assert (line["method"], line["path"], line["status"]) == (method, path, response.status_code) and line[
            "milliseconds"
        ] >= 0
    line = requests[good.headers["x-request-id"]]
    assert line["key"] == "c16678f8" and line["bytes_received"] == int(good.request.headers["content-length"])
    assert len(requests[strange.headers["x-request-id"]]["path"]) == 200
    assert len(requests) == sum("status" in line for line in lines), "one line per request"
    assert [line for line in lines if line["logger"].startswith("uvicorn")] and [
        line for line in lines if "a defect" in line.get("traceback", "")
    ]
    on_stderr = [
        line for line in (tmp_path / "stderr").read_text(encoding="utf-8").splitlines() if line.startswith("{")
    ]
    assert on_stderr == text.splitlines()


def test_text_format(tmp_path: Path) -> None:
    process, url = serve(tmp_path, LOG_FORMAT="text", LOG_LEVEL="INFO")
    try:
        response = httpx.post(f"{url}/predict", content=b"12345")
    finally:
        stop(process)
    assert (
        f"INFO    {response.headers['x-request-id']} POST /predict 200 in " in (tmp_path / "stderr").read_text()
        and ", 5 bytes received, key c16678f8" in (tmp_path / "stderr").read_text()
    )


def test_processes_of_a_server_write_one_file_that_is_rotated(tmp_path: Path) -> None:
    file = tmp_path / "service.log"
    process, url = serve(tmp_path, "--workers", "2", LOG_FILE=str(file), LOG_FORMAT="json")
    numbers = []
    try:
        with httpx.Client(headers={"Connection": "close"}) as client:
            for round_ in range(3):
                numbers += [client.post(f"{url}/predict", content=b"x").headers["x-request-id"] for _ in range(40)]
                if round_ < 2:
                    file.rename(tmp_path / f"service.log.{round_}")
    finally:
        process.terminate()
        process.wait(30)
    files = [
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in (tmp_path / "service.log.0", tmp_path / "service.log.1", file)
    ]
    assert sorted(line["request_id"] for lines in files for line in lines if line.get("path") == "/predict") == sorted(
        numbers
    )
    assert all(files)


WRITER = """
import logging, sys
from pathlib import Path
from pillsnap.config.environment import Environment
from pillsnap.service.logging import setup_service_logging
setup_service_logging(Environment(log_file=Path(sys.argv[1]), log_format="json"))
for number in range(300):
    logging.getLogger("pillsnap").info("%s %d %s", sys.argv[2], number, sys.argv[2] * (number * 67 % 20_000))
"""


def test_lines_of_many_processes_do_not_mix(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "log")]
    writers = [
        subprocess.Popen([*command, letter], env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
        for letter in "abc"
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    messages = [json.loads(line)["message"].split(" ") for line in (tmp_path / "log").read_text().splitlines()]
    assert len(messages) == 900
    for letter, number, filling in messages:
        assert filling == letter * (int(number) * 67 % 20_000)


FULL = """
import json, logging, resource, sys
from pathlib import Path
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pillsnap.config.environment import Environment
from pillsnap.service.logging import AccessLog, setup_service_logging

mode, folder = sys.argv[1], Path(sys.argv[2])
app = FastAPI()
app.add_middleware(AccessLog)
app.get("/health")(lambda: {"ok": True})
setup_service_logging(Environment(log_file=folder / "service.log", log_format="json"))
if mode == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
else:
    (folder / "filling").write_bytes(bytes(40_000))
with TestClient(app) as client:
    for _ in range(400):
        assert client.get("/health").status_code == 200
    if mode == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    else:
        (folder / "filling").unlink()
    for _ in range(10):
        assert client.get("/health").status_code == 200
"""


def mount(folder: Path) -> bool:
    """Mount a disk of 64 kB; returns whether that was possible."""
    return (
        os.geteuid() == 0
        and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True
        ).returncode
        == 0
    )


def test_full_disk_loses_log_lines_and_no_responses(tmp_path: Path) -> None:
    for mode in ("limit", "disk"):
        folder = tmp_path / mode
        folder.mkdir()
        if mode == "disk" and not mount(folder):
            continue  # only root can mount a disk; a limit on the file size has the same effect
        try:
            done = subprocess.run(
                [sys.executable, "-c", FULL, mode, str(folder)],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0 and "Traceback" not in done.stderr and "Logging error" not in done.stderr, (
                done.stderr[-3000:]
            )
            messages = [json.loads(line)["message"] for line in done.stderr.splitlines()]
            reports = [message for message in messages if "log file" in message]
            assert len(reports) == 2
            assert "can't be written" in reports[0] and "can be written again" in reports[1]
            missing = int(reports[1].split(", ")[1].split()[0])
            complete = []
            for line in (folder / "service.log").read_text(encoding="utf-8").splitlines():
                try:
                    complete.append(json.loads(line))
                except ValueError:
                    continue  # the truncated line
            assert missing > 50 and len(complete) == 410 - missing, "every other line is complete"
        finally:
            if mode == "disk":
                subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("file", ["/proc/nowhere/service.log", "folder", "/dev/full"])
def test_unwritable_file_is_reported_once(file: str, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / "folder").mkdir()
    setup_service_logging(Environment(log_file=tmp_path / file, log_format="text"))
    for number in range(20):
        logging.getLogger("pillsnap").info("line %d", number)
    err = capfd.readouterr().err
    assert err.count("can't be written") == 1 and err.count("INFO") == 20 and "Traceback" not in err


def test_folder_that_disappears_and_comes_back(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    file = tmp_path / "logs" / "service.log"
    setup_service_logging(Environment(log_file=file, log_format="text"))
    for step in range(3):
        logging.getLogger("pillsnap").info("line %d", step)
        if step == 0:
            (tmp_path / "logs").rename(tmp_path / "old")
            (tmp_path / "logs").write_text("a file where the folder was")
        if step == 1:
            (tmp_path / "logs").unlink()
    assert file.read_text().endswith("line 2\n") and "1 lines are missing" in capfd.readouterr().err


def test_second_setup_adds_no_handler(capfd: pytest.CaptureFixture) -> None:
    for level in ("INFO", "WARNING"):
        setup_service_logging(Environment(log_level=level))
    logging.getLogger("pillsnap").info("too quiet")
    logging.getLogger("pillsnap").warning("loud")
    lines = capfd.readouterr().err.splitlines()
    assert [json.loads(line)["message"] for line in lines] == ["loud"], "JSON where stderr is no terminal"
    assert sum(isinstance(handler, (Console, LogFile)) for handler in logging.getLogger().handlers) == 1


def test_environment_sets_file_and_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOG_FILE", "LOG_FORMAT"):
        monkeypatch.delenv(name, raising=False)
    assert (load_environment(tmp_path).log_file, load_environment(tmp_path).log_format) == (None, None)
    (tmp_path / ".env").write_text("LOG_FILE=logs/service.log\nLOG_FORMAT=TEXT\n")
    assert (load_environment(tmp_path).log_file, load_environment(tmp_path).log_format) == (
        tmp_path / "logs/service.log",
        "text",
    )
    monkeypatch.setenv("LOG_FORMAT", "xml")
    with pytest.raises(SettingsError, match="text, json"):
        load_environment(tmp_path)
