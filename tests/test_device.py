"""Choice of the torch device: the fastest one available, unless the environment selects the CPU."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch

from pillsnap.training.device import hardware
from pillsnap.training.device.ways import number_formats


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """A function that fakes the devices of this machine."""

    def has(cuda: bool, mps: bool, visible: str | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"an example GPU, number {device.index}")
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return has


@pytest.mark.parametrize(
    ("cuda", "mps", "visible", "chosen", "reason"),
    [
        (True, True, None, "cuda:1", "an example GPU, number 1"),
        (True, False, "0,1", "cuda:1", "an example GPU, number 1"),
        (False, True, None, "mps", "no CUDA device found, Apple GPU"),
        (False, True, "0", "mps", "no CUDA device found, Apple GPU"),
        (False, True, "", "cpu", "CUDA_VISIBLE_DEVICES names no GPU"),
        (False, True, "-1", "cpu", "CUDA_VISIBLE_DEVICES names no GPU"),
        (False, False, None, "cpu", "no CUDA device found and no Apple GPU"),
    ],
)
def test_cuda_before_mps_before_cpu(
    machine, caplog: pytest.LogCaptureFixture, cuda: bool, mps: bool, visible: str | None, chosen: str, reason: str
):
    machine(cuda, mps, visible)
    with caplog.at_level(logging.INFO, logger="pillsnap"):
        assert str(hardware.choose_device()) == chosen
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("device: ")]
    assert line.startswith(f"device: {chosen.partition(':')[0]} (") and reason in line


def test_apple_gpu_trains_in_float32():
    requested, automatic = (number_formats(amp, torch.device("mps")) for amp in ("bf16", "auto"))
    assert requested.names == automatic.names == ("off",)
    assert requested.fallback and not automatic.fallback and "Apple" in requested.reason


def test_torch_reads_its_threads_from_the_environment():
    code = (
        "from pillsnap.training.device.hardware import choose_device, device_name; "
        "print(choose_device(), device_name(choose_device()))"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "cpu 1 processor threads"
