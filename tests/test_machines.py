"""Training on two machines, which are network namespaces: the same curve as on one, and no waiting for a lost one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from pillsnap.bench.scale.network import Network, NotPermitted
from pillsnap.config.load import settings_as_yaml
from pillsnap.config.schema import Settings
from pillsnap.training.run import train

ROOT = Path(__file__).parents[1]
BATCH = ("train.classifier.batch_size=4", "train.classifier.grad_accum=2")  # a piece for each machine
LISTENING = """
import sys
import threading
from pillsnap import cli
from pillsnap.training.device import distributed
distributed._BEAT, distributed._SILENCE = 0.5, 12.0
status = cli.main(sys.argv[1:])
talking = [thread for thread in threading.enumerate() if thread.name == distributed._SIGNS]
sys.exit(status or f"still talking: {talking}" if talking else status)
"""  # `pillsnap` that waits for a silent machine for 12 seconds instead of 40, and leaves no thread behind
SHORT = ("train.only=classifier", "train.amp=off", "train.classifier.epochs=2", *BATCH)


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """Two machines with a cable between them."""
    try:
        opened = Network("10.213.79")
    except NotPermitted as error:
        pytest.skip(str(error))
    yield opened
    opened.close()


def torchrun(network: Network, number: int, settings: Path, folder: Path, *more: str) -> subprocess.Popen[str]:
    """Start the part of a training that runs on one machine."""
    place = ["--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "1"]
    head = ["--master-addr", network.addresses[0], "--master-port", "29511"]
    (program := settings.with_name("listening.py")).write_text(LISTENING)
    words = [str(program), "train", "--cfg", str(settings), "--run-dir", str(folder), *more]
    command = network.command(number, sys.executable, "-m", "torch.distributed.run", *place, *head, *words)
    interface = {"GLOO_SOCKET_IFNAME": network.ends[number], "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=os.environ | interface, **pipes)


def losses(folder: Path) -> list[float]:
    """Loss of every step."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def close(left: list[float], right: list[float]) -> bool:
    """Equal but for rounding, which grows from step to step."""
    return np.allclose(left[:10], right[:10], rtol=1e-4) and np.allclose(left, right, rtol=2e-2)


def test_two_machines_train_as_one(network: Network, tiny_settings: Callable[..., Settings], tmp_path: Path):
    settings = tiny_settings(*SHORT)
    (tmp_path / "settings.yaml").write_text(settings_as_yaml(settings))
    alone = losses(train(settings, tmp_path / "alone"))
    both = [torchrun(network, number, tmp_path / "settings.yaml", tmp_path / "both") for number in (0, 1)]
    said = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(said)[-4000:]
    assert close(losses(tmp_path / "both"), alone)


@pytest.mark.parametrize("lost", ["killed", "cut off"])  # the network stays cut
def test_a_lost_machine_ends_the_other_which_goes_on_alone(
    network: Network, tiny_settings: Callable[..., Settings], tmp_path: Path, lost: str
):
    (tmp_path / "settings.yaml").write_text(settings_as_yaml(tiny_settings(*SHORT)))
    long = ("train.classifier.epochs=400", "train.save_minutes=0.002")
    both = [torchrun(network, number, tmp_path / "settings.yaml", tmp_path / "cut", *long) for number in (0, 1)]
    end = time.monotonic() + 120
    while not (tmp_path / "cut" / "last.pt").is_file() and time.monotonic() < end:
        time.sleep(0.2)
    assert (tmp_path / "cut" / "last.pt").is_file()
    if lost == "killed":
        network.kill(1)
    else:
        network.cut()
    started = time.monotonic()
    said = [process.communicate(timeout=120)[0] for process in both]
    assert time.monotonic() - started < 40 and 0 not in [process.returncode for process in both]
    assert lost == "killed" or any("for 12 seconds, its machine or the network is down" in text for text in said), (
        "\n".join(said)[-4000:]
    )
    begun = len(losses(tmp_path / "cut"))
    rest = tiny_settings(*SHORT, "train.resume=last", "train.classifier.epochs=400", "train.save_minutes=0.002")
    (tmp_path / "rest.yaml").write_text(settings_as_yaml(rest))
    words = [sys.executable, "-m", "pillsnap", "train", "--cfg", str(tmp_path / "rest.yaml")]
    process = subprocess.Popen([*words, "--run-dir", str(tmp_path / "cut")], stderr=subprocess.PIPE)
    end = time.monotonic() + 120
    while len(losses(tmp_path / "cut")) <= begun and time.monotonic() < end:
        time.sleep(0.5)
    process.kill()
    process.communicate()
    assert len(losses(tmp_path / "cut")) > begun, "one machine goes on"
