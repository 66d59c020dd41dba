"""The service's log: one form for all lines, a file that many write to and that may be moved or full, and nothing private in it."""
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

from pillsnap.environment import Environment, load_environment
from pillsnap.schema import SettingsError
from pillsnap.service.journal import Console, JournalFile, setup_service_logging

ROOT = Path(__file__).parents[1]
APP = """
import logging
from contextlib import asynccontextmanager
from pathlib import Path
from asgi_correlation_id import CorrelationIdMiddleware
from fastapi import FastAPI, Request
from pillsnap.environment import load_environment
from pillsnap.service.journal import AccessLog, setup_service_logging
from pillsnap.service.problems import Problem, answer_problems

@asynccontextmanager
async def lifespan(app):
    setup_service_logging(load_environment(Path.cwd()))
    yield

app = FastAPI(lifespan=lifespan)
app.add_middleware(AccessLog)
app.add_middleware(CorrelationIdMiddleware)
answer_problems(app)

@app.post("/predict")
async def predict(request: Request):
    request.state.key_name = "c16678f8"
    return {"bytes": len(await request.body())}

@app.get("/fails")
async def fails():
    raise RuntimeError("a defect")

@app.get("/refuses")
async def refuses():
    raise Problem(403, "key_wrong", "The API key is wrong.")
"""


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    """The loggers are as they were."""
    known = [logging.getLogger(name) for name in (None, "pillsnap", "uvicorn", "uvicorn.error", "uvicorn.access")]
    before = [(logger, list(logger.handlers), logger.level, logger.propagate) for logger in known]
    yield
    for logger, handlers, level, propagate in before:
        logger.handlers[:], logger.level, logger.propagate = handlers, level, propagate


def serve(folder: Path, *options: str, **variables: str) -> tuple[subprocess.Popen, str]:
    """A real uvicorn with the app above; its process and address."""
    (folder / "little.py").write_text(APP)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{folder}", "PYTHONUNBUFFERED": "1", **variables}
    process = subprocess.Popen([sys.executable, "-m", "uvicorn", "little:app", "--port", str(port), *options], cwd=folder, env=environment, stderr=(folder / "stderr").open("w"))
    ends = time.monotonic() + 60
    while True:
        try:
            httpx.get(f"http://127.0.0.1:{port}/nothing", timeout=5)
            return process, f"http://127.0.0.1:{port}"
        except httpx.HTTPError:
            assert process.poll() is None and time.monotonic() < ends, (folder / "stderr").read_text()
            time.sleep(0.1)


def ended(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGINT)
    process.wait(30)


def test_every_line_of_a_server_is_json_and_says_nothing_private(tmp_path: Path) -> None:
    process, url = serve(tmp_path, LOG_FILE=str(tmp_path / "logs" / "service.log"))
    try:
        good = httpx.post(f"{url}/predict?pipeline=combo", headers={"X-API-Key": "a-secret-key"}, files={"image": ("my-knee.jpg", b"GPS 37.5 127.0")})
        failed, refused, strange = httpx.get(f"{url}/fails"), httpx.get(f"{url}/refuses"), httpx.get(f"{url}/{'x' * 3000}%0D%0Aline%22")
        assert [answer.status_code for answer in (good, failed, refused, strange)] == [200, 500, 403, 404]
    finally:
        ended(process)
    text = (tmp_path / "logs" / "service.log").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert all({"time", "level", "message", "request_id"} <= set(line) for line in lines)
    assert not any(word in text + (tmp_path / "stderr").read_text() for word in ("combo", "secret", "knee", "GPS", "color_message"))
    requests = {line["request_id"]: line for line in lines if "status" in line}
    assert "127.0.0.1" not in json.dumps(list(requests.values())), "no caller has an address"
    for answer, method, path in ((good, "POST", "/predict"), (failed, "GET", "/fails"), (refused, "GET", "/refuses")):
        line = requests[answer.headers["x-request-id"]]
        assert (line["method"], line["path"], line["status"]) == (method, path, answer.status_code) and line["milliseconds"] >= 0
    line = requests[good.headers["x-request-id"]]
    assert line["key"] == "c16678f8" and line["bytes_received"] == int(good.request.headers["content-length"])
    assert len(requests[strange.headers["x-request-id"]]["path"]) == 200
    assert len(requests) == sum("status" in line for line in lines), "one line per request"
    assert [line for line in lines if line["logger"].startswith("uvicorn")] and [line for line in lines if "a defect" in line.get("traceback", "")]
    on_stderr = [line for line in (tmp_path / "stderr").read_text(encoding="utf-8").splitlines() if line.startswith("{")]
    assert on_stderr == text.splitlines()


def test_text_is_for_people(tmp_path: Path) -> None:
    process, url = serve(tmp_path, LOG_FORMAT="text", LOG_LEVEL="INFO")
    try:
        answer = httpx.post(f"{url}/predict", content=b"12345")
    finally:
        ended(process)
    assert f"INFO    {answer.headers['x-request-id']} POST /predict 200 in " in (tmp_path / "stderr").read_text() and ", 5 bytes received, key c16678f8" in (tmp_path / "stderr").read_text()


def test_processes_of_a_server_write_one_file_that_may_be_moved(tmp_path: Path) -> None:
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
    parts = [[json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in (tmp_path / "service.log.0", tmp_path / "service.log.1", file)]
    assert sorted(line["request_id"] for part in parts for line in part if line.get("path") == "/predict") == sorted(numbers)
    assert all(part for part in parts)


WRITER = """
import logging, sys
from pathlib import Path
from pillsnap.environment import Environment
from pillsnap.service.journal import setup_service_logging
setup_service_logging(Environment(log_file=Path(sys.argv[1]), log_format="json"))
for number in range(300):
    logging.getLogger("pillsnap").info("%s %d %s", sys.argv[2], number, sys.argv[2] * (number * 67 % 20_000))
"""


def test_lines_of_many_processes_do_not_mix(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "log")]
    writers = [subprocess.Popen([*command, letter], env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL) for letter in "abc"]
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
from pillsnap.environment import Environment
from pillsnap.service.journal import AccessLog, setup_service_logging

way, folder = sys.argv[1], Path(sys.argv[2])
app = FastAPI()
app.add_middleware(AccessLog)
app.get("/health")(lambda: {"ok": True})
setup_service_logging(Environment(log_file=folder / "service.log", log_format="json"))
if way == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
else:
    (folder / "filling").write_bytes(bytes(40_000))
with TestClient(app) as client:
    for _ in range(400):
        assert client.get("/health").status_code == 200
    if way == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    else:
        (folder / "filling").unlink()
    for _ in range(10):
        assert client.get("/health").status_code == 200
"""


def mounted(folder: Path) -> bool:
    """Whether a disk of 64 kB could be put there."""
    return os.geteuid() == 0 and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True).returncode == 0


def test_a_full_disk_costs_lines_and_no_answers(tmp_path: Path) -> None:
    for way in ("limit", "disk"):
        folder = tmp_path / way
        folder.mkdir()
        if way == "disk" and not mounted(folder):
            continue  # only root may make a disk; a limit on the file's size is the same to the program
        try:
            done = subprocess.run([sys.executable, "-c", FULL, way, str(folder)], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
            assert done.returncode == 0 and "Traceback" not in done.stderr and "Logging error" not in done.stderr, done.stderr[-3000:]
            messages = [json.loads(line)["message"] for line in done.stderr.splitlines()]
            said = [message for message in messages if "log file" in message]
            assert len(said) == 2 and "can't be written" in said[0] and "can be written again" in said[1]
            missing = int(said[1].split(", ")[1].split()[0])
            whole = []
            for line in (folder / "service.log").read_text(encoding="utf-8").splitlines():
                try:
                    whole.append(json.loads(line))
                except ValueError:
                    continue  # the one that was cut off
            assert missing > 50 and len(whole) == 410 - missing, "every other line is there and whole"
        finally:
            if way == "disk":
                subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("file", ["/proc/nowhere/service.log", "folder", "/dev/full"])
def test_a_file_that_cannot_be_written_is_said_once(file: str, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / "folder").mkdir()
    setup_service_logging(Environment(log_file=tmp_path / file, log_format="text"))
    for number in range(20):
        logging.getLogger("pillsnap").info("line %d", number)
    err = capfd.readouterr().err
    assert err.count("can't be written") == 1 and err.count("INFO") == 20 and "Traceback" not in err


def test_a_folder_that_goes_away_and_comes_back(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
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


def test_setting_up_twice_doubles_nothing(capfd: pytest.CaptureFixture) -> None:
    for level in ("INFO", "WARNING"):
        setup_service_logging(Environment(log_level=level))
    logging.getLogger("pillsnap").info("too quiet")
    logging.getLogger("pillsnap").warning("loud")
    lines = capfd.readouterr().err.splitlines()
    assert [json.loads(line)["message"] for line in lines] == ["loud"], "JSON where it is no terminal"
    assert sum(isinstance(handler, (Console, JournalFile)) for handler in logging.getLogger().handlers) == 1


def test_the_environment_names_file_and_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOG_FILE", "LOG_FORMAT"):
        monkeypatch.delenv(name, raising=False)
    assert (load_environment(tmp_path).log_file, load_environment(tmp_path).log_format) == (None, None)
    (tmp_path / ".env").write_text("LOG_FILE=logs/service.log\nLOG_FORMAT=TEXT\n")
    assert (load_environment(tmp_path).log_file, load_environment(tmp_path).log_format) == (tmp_path / "logs/service.log", "text")
    monkeypatch.setenv("LOG_FORMAT", "xml")
    with pytest.raises(SettingsError, match="text, json"):
        load_environment(tmp_path)
