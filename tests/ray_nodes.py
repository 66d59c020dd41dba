"""Ray nodes in network namespaces of this machine, one core each, as if they were machines of a network."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PORT = 6379
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
LEAN = ["--disable-usage-stats", "--include-log-monitor", "false", "--num-cpus", "1"]


def call(*words: str) -> str:
    """Run a command; an error has its output."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr or done.stdout}"
    return done.stdout


class Network:
    """Two namespaces with a cable between them; skips the tests where they are not permitted."""

    def __init__(self, net: str = "10.213.77") -> None:
        if shutil.which("ip") is None:
            pytest.skip("there is no `ip` on this machine: apt-get install iproute2")
        mark = secrets.token_hex(2)
        self.names = [f"pill{mark}{letter}" for letter in "ab"]
        self.addresses = [f"{net}.1", f"{net}.2"]
        made = subprocess.run(["ip", "netns", "add", self.names[0]], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"network namespaces are not permitted here: {made.stderr.strip()}")
        call("ip", "netns", "add", self.names[1])
        ends = [f"v{mark}a", f"v{mark}b"]
        call("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for end, name, address in zip(ends, self.names, self.addresses, strict=True):
            call("ip", "link", "set", end, "netns", name)
            call("ip", "-n", name, "addr", "add", f"{address}/24", "dev", end)
            call("ip", "-n", name, "link", "set", end, "up")
            call("ip", "-n", name, "link", "set", "lo", "up")
        self.ends = ends

    def pids(self, number: int) -> list[int]:
        """Processes of a namespace."""
        return [int(pid) for pid in call("ip", "netns", "pids", self.names[number]).split()]

    def command(self, number: int, *words: str) -> list[str]:
        """A command that runs in a namespace."""
        return ["ip", "netns", "exec", self.names[number], *words]

    def kill(self, number: int) -> None:
        """End everything in a namespace at once, as when a machine loses its power."""
        for pid in self.pids(number):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def close(self) -> None:
        """End all processes and remove the namespaces."""
        for number, name in enumerate(self.names):
            self.kill(number)
            call("ip", "netns", "del", name)


class Nodes:
    """A head in the first namespace, and a node in the second when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.network, self.folder = Network(), folder
        self.address = f"{self.network.addresses[0]}:{PORT}"
        self.environment = {
            **os.environ,
            "RAY_ADDRESS": self.address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        try:
            self._start(0, "--head", "--port", str(PORT), "--include-dashboard", "false")
        except BaseException:
            self.close()
            raise

    def _start(self, number: int, *words: str, tries: int = 3) -> None:
        """Start a node and give it one core; its helpers may be too slow on a busy machine."""
        place = ["--node-ip-address", self.network.addresses[number], "--temp-dir", str(self.temporary(number))]
        store = ["--object-store-memory", str(150 * 10**6)]
        command = self.network.command(number, *RAY, "start", *words, *place, *store, *LEAN)
        for left in reversed(range(tries)):
            done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=self.environment)
            if done.returncode == 0:
                break
            self.network.kill(number)
            assert left, done.stdout + done.stderr
        core = sorted(os.sched_getaffinity(0))[number % len(os.sched_getaffinity(0))]
        for pid in self.network.pids(number):
            subprocess.run(["taskset", "-acp", str(core), str(pid)], capture_output=True)

    def temporary(self, number: int) -> Path:
        """Folder of a node's logs and sockets, whose path has to be short."""
        return Path(f"/tmp/{self.network.names[number]}")

    def add(self) -> None:
        """Start the second node, on a small disk of its own."""
        if not self.temporary(1).is_mount():
            self.temporary(1).mkdir()
            call("mount", "-t", "tmpfs", "-o", "size=128m", "tmpfs", str(self.temporary(1)))
        self._start(1, "--address", self.address)

    def start(self, *words: str, **more: str) -> subprocess.Popen[str]:
        """Start `pillsnap` beside the head; `more` is added to the environment."""
        command = self.network.command(0, sys.executable, "-m", "pillsnap", *words)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": self.folder}
        return subprocess.Popen(command, env=self.environment | more, **pipes)

    def run(self, *words: str, status: int = 0, **more: str) -> tuple[str, str]:
        """Run `pillsnap` beside the head; returns what it prints, and its log."""
        process = self.start(*words, **more)
        try:
            printed, log = process.communicate(timeout=240)
        finally:
            process.kill()
        assert process.returncode == status, log[-3000:]
        return printed, log

    def workers(self, number: int) -> list[int]:
        """Worker processes of a node that have a task."""
        found = []
        for pid in self.network.pids(number):
            try:
                line = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            if line.startswith(b"ray::answer"):
                found.append(pid)
        return found

    def wait_for_worker(self, number: int, seconds: float = 60) -> int:
        """A worker of a node, as soon as one has a task."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := self.workers(number):
                return found[0]
            time.sleep(0.05)
        raise AssertionError(f"no worker of {self.network.names[number]} had a task in {seconds:g} seconds")

    def close(self) -> None:
        """End all nodes and remove what they wrote."""
        self.network.close()
        subprocess.run(["umount", "--lazy", str(self.temporary(1))], capture_output=True)
        for number in (0, 1):
            shutil.rmtree(self.temporary(number), ignore_errors=True)
