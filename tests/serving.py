"""The real service in its own processes, for tests from the client's side."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from tiny_models import CONFIG, RIGHT

ADMIN = "Qm3-vT8yLs_w5Kd0XzRa"


@dataclass
class Running:
    """A running server."""

    url: str
    process: subprocess.Popen
    log: Path

    def processes(self) -> list[psutil.Process]:
        """The process of the server and its children."""
        whole = psutil.Process(self.process.pid)
        return [whole, *whole.children(recursive=True)]

    def memory_mb(self) -> float:
        """Resident memory of all processes."""
        return sum(process.memory_info().rss for process in self.processes()) / 1e6


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running(
    models: Path,
    folder: Path,
    settings: str = "",
    *options: str,
    limits: str = "  requests_per_minute: 0\n",
    **environment: str,
) -> Iterator[Running]:
    """Run `uvicorn pillsnap.serve:app` in a folder with these settings; yields when it is ready."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(f"serve:\n{limits}{settings}", encoding="utf-8")
    url, log = f"http://127.0.0.1:{(port := free_port())}", folder / "server.log"
    variables = {
        **os.environ,
        "API_KEY": RIGHT,
        "ADMIN_KEY": ADMIN,
        "MODEL_PATH": str(models),
        "PYTHONPATH": str(CONFIG.parent),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    command = [sys.executable, "-m", "uvicorn", "pillsnap.serve:app", "--port", str(port), *options]
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=folder, env=variables, stdout=file, stderr=file)
    try:
        wait_until_ready(url, process, log)
        yield Running(url, process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.wait()
            raise AssertionError("the server did not end within 30 seconds of SIGTERM") from None


def wait_until_ready(url: str, process: subprocess.Popen, log: Path) -> None:
    for _ in range(600):
        if process.poll() is not None:
            break
        try:
            if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError(f"the server was not ready:\n{log.read_text(encoding='utf-8')[-3000:]}")
