"""Measurements hold for both kinds of network, and a network that can't be measured is refused with a sentence."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from pillsnap.evaluation.performance import (
    PerformanceError,
    estimate_training_time,
    inference_step,
    measure_memory_usage,
    plain_hardware,
    synthetic_loss,
    training_step,
    validate_reproducibility,
)
from pillsnap.models.detector import RawDetections, build_detector

CPU = plain_hardware("cpu")


@pytest.mark.parametrize(
    "make",
    [
        lambda: timm.create_model("test_efficientnet", num_classes=3),
        lambda: build_detector("yolo11n.yaml"),
        lambda: RawDetections(build_detector("yolo11n.yaml")),
    ],
)
def test_measuring_does_not_change_a_network(make):
    network = make().train()
    if not isinstance(network, RawDetections):
        synthetic_loss(network, torch.rand(2, 3, 64, 64)).backward()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for step in (inference_step, training_step):
        step(network, 64, 2, CPU)()
    assert network.training and all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert 0 < estimate_training_time(network, 64, 2, 100, 2, CPU, runs=1) < 10


def test_training_time_is_extrapolated_from_steps(monkeypatch: pytest.MonkeyPatch):
    from pillsnap.evaluation import performance

    monkeypatch.setattr(performance, "timed_attempt", lambda *_, **__: performance.Trial(7.2, 0, 0))
    assert estimate_training_time(
        nn.Identity(), 64, epochs=3, samples=1001, batch_size=10, hardware=CPU
    ) == pytest.approx(301 * 7.2 / 3600)


def test_failed_process_reports_the_reason():
    with pytest.raises(
        PerformanceError,
        match=r"memory of asking with 1 pictures of 64 px can't be measured \(RuntimeError: mat1 and mat2",
    ):
        measure_memory_usage(nn.Linear(3, 4), 64, 1, CPU)


@pytest.mark.parametrize("runs, metrics", [(1, [{"top1": 1.0}]), (2, [{"top1": 1.0}, {"map50": 1.0}]), (2, [{}, {}])])
def test_runs_that_cannot_be_compared_are_refused(runs: int, metrics: list[dict]):
    results = iter(metrics)
    with pytest.raises(PerformanceError):
        validate_reproducibility(lambda: next(results), runs=runs)


def test_run_with_its_own_seed_is_not_reproducible():
    assert validate_reproducibility(lambda: {"value": float(torch.rand(1))})[0]
    generator = torch.Generator().manual_seed(1)
    same, difference = validate_reproducibility(lambda: {"value": float(torch.rand(1, generator=generator))})
    assert not same and difference > 0
