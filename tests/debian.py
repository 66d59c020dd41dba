"""Programs of Debian that tests need: installed where that is possible, else the test is skipped."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def program(name: str, package: str) -> str:
    """The path of a program; installs its package where it may."""
    where = f"{os.environ.get('PATH', '')}:/usr/sbin"
    if not shutil.which(name, path=where) and os.geteuid() == 0 and shutil.which("apt-get"):
        for command in (["apt-get", "update"], ["apt-get", "install", "--yes", "--no-install-recommends", package]):
            variables = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            subprocess.run(command, env=variables, capture_output=True, check=False)
    found = shutil.which(name, path=where)
    if found is None:
        advice = f"This is tested with {name}, and there is none: install the Debian package {package}."
        (pytest.fail if os.environ.get("CI") else pytest.skip)(advice)
    return str(found)


@contextmanager
def redis_server(folder: Path, port: int) -> Iterator[subprocess.Popen]:
    """A Redis server that writes everything down before it answers."""
    folder.mkdir(parents=True, exist_ok=True)
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "yes"]
    command = [program("redis-server", "redis-server"), *options, "--appendfsync", "always", "--dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_for_port(port)
        yield process
    finally:
        process.terminate()
        process.wait(10)


def wait_for_port(port: int) -> None:
    """Wait until something listens."""
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(f"nothing listens on port {port}")
