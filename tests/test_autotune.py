"""Autotune: the chosen batch size fits into any memory, and it is measured once."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from pillsnap.config.load import load_settings
from pillsnap.config.schema import Settings
from pillsnap.training.device.autotune import (
    HEADROOM,
    Trial,
    TuneError,
    choose_batch_size,
    fits,
    smallest_fast,
    timed_attempt,
)

KEY = "a GPU, a network, 640 px, bf16, none"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings whose results go into an empty folder."""
    return load_settings(profile="cpu", overrides=[f"paths.cache_root={tmp_path / 'cache'}"])


def curve(
    base: float, image: float, room: float, fastest: float = 4.0, raises_at: float = math.inf
) -> tuple[Callable[[int], Trial], list[int]]:
    """An attempt that takes base + image * size bytes, and the sizes it was called with.

    Images per second no longer rise above `fastest` images.
    """
    tried: list[int] = []

    def attempt(size: int) -> Trial:
        tried.append(size)
        if size >= raises_at or base + image * size > room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return Trial(0.01 * max(fastest, size), round(base + image * size), round(room), round(base))

    return attempt, tried


def test_the_largest_batch_that_fits_a_gpu(settings: Settings):
    random_numbers = random.Random(7)
    for number in range(40):
        room, ceiling = (
            10 ** random_numbers.uniform(6, 11),
            random_numbers.choice([16, 64, 160, 224, random_numbers.randint(1, 2000)]),
        )
        attempt, tried = curve(
            room * random_numbers.uniform(0, 0.8),
            room * 10 ** random_numbers.uniform(-5, -1.2),
            room,
            raises_at=random_numbers.choice([math.inf, random_numbers.randint(2, 300)]),
        )
        best = choose_batch_size("batch size", attempt, ceiling, settings, str(number), cuda=True)
        assert (
            1 <= best <= ceiling == max(ceiling, *tried) and len(tried) == len(set(tried)) <= 2 * math.log2(ceiling) + 3
        )
        assert fits(attempt(best))
        too_large = next(size for size in range(best + 1, ceiling + 2) if size > ceiling or not fits_at(attempt, size))
        assert best == ceiling or too_large - best <= max(8, best / 16), "no much larger size fits"
        assert best <= 16 or best % 8 == 0 or best == ceiling


def fits_at(attempt: Callable[[int], Trial], size: int) -> bool:
    """Whether a size fits, errors included."""
    try:
        return fits(attempt(size))
    except torch.OutOfMemoryError:
        return False


def test_the_smallest_of_the_fast_batches_on_a_processor(settings: Settings):
    random_numbers = random.Random(8)
    for number in range(100):
        room, ceiling, fastest = 1e9, random_numbers.randint(1, 300), random_numbers.uniform(1, 64)
        attempt, tried = curve(2e8, 10 ** random_numbers.uniform(5, 8.6), room, fastest)
        best = choose_batch_size("batch size", attempt, ceiling, settings, str(number), cuda=False)
        assert 1 <= best <= ceiling and max(tried) <= ceiling and len(tried) <= math.log2(ceiling) + 3
        assert fits(attempt(best)) and best <= max(4, 2 * fastest)


def test_a_cpu_trial_never_needs_more_memory_than_there_is(settings: Settings, caplog: pytest.LogCaptureFixture):
    """The system would kill the process instead of refusing the memory."""
    caplog.set_level(logging.INFO, logger="pillsnap")
    for image in (1e7, 3e7, 9e7):
        attempt, tried = curve(2e8, image, 1e9, fastest=1000)
        choose_batch_size("batch size", attempt, 224, settings, str(image), cuda=False)
        assert max(tried) * image + 2e8 <= HEADROOM * 1e9
        assert "more might take more memory" in caplog.records[-1].getMessage()


@pytest.mark.parametrize("cuda", [True, False])
@pytest.mark.parametrize("most", [1, 2, 3, 7])
def test_a_first_size_that_is_too_large_is_halved(settings: Settings, cuda: bool, most: int):
    attempt, _ = curve(0, 1, 1e9, fastest=64, raises_at=most + 1)
    best = choose_batch_size("batch size", attempt, 64, settings, KEY, cuda)
    assert best == most if cuda else 1 <= best <= most


@pytest.mark.parametrize("cuda", [True, False])
def test_a_machine_without_memory_for_one_image_is_an_error(settings: Settings, cuda: bool):
    attempt, tried = curve(0, 1, 0.5)
    with pytest.raises(TuneError, match="not even one image fits") as caught:
        choose_batch_size("detector batch size", attempt, 64, settings, KEY, cuda)
    assert min(tried) == 1 and "detector" in str(caught.value)
    assert not (settings.paths.cache_root / "batch.json").exists()


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")]
)
def test_every_out_of_memory_error_means_too_large(settings: Settings, error: Exception):
    def attempt(size: int) -> Trial:
        if size > 20:
            raise error
        return Trial(0.1, size, 1000)

    assert choose_batch_size("batch size", attempt, 64, settings, KEY, cuda=True) == 16


def test_other_errors_propagate(settings: Settings):
    def attempt(size: int) -> Trial:
        raise RuntimeError("The size of tensor a must match the size of tensor b")

    with pytest.raises(RuntimeError, match="size of tensor"):
        choose_batch_size("batch size", attempt, 64, settings, KEY, cuda=True)


@pytest.mark.parametrize("cuda", [True, False])
def test_a_result_is_cached_until_something_changes(settings: Settings, cuda: bool, caplog: pytest.LogCaptureFixture):
    attempt, tried = curve(0, 1, 100, fastest=16)
    with caplog.at_level(logging.INFO, logger="pillsnap"):
        best = choose_batch_size("batch size", attempt, 64, settings, KEY, cuda)
        trials = len(tried)
        assert choose_batch_size("batch size", attempt, 64, settings, KEY, cuda) == best and len(tried) == trials
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2 and "images per second" in lines[0] and "measured earlier" in lines[1]
    assert all(record.levelno == logging.INFO for record in caplog.records)
    choose_batch_size("batch size", attempt, 64, settings, KEY.replace("640", "320"), cuda)
    assert len(tried) == 2 * trials
    assert choose_batch_size("batch size", attempt, 2, settings, KEY, cuda) <= 2, "another ceiling is measured"
    assert choose_batch_size("batch size", attempt, 64, settings, KEY, cuda) == best and len(tried) < 4 * trials, (
        "earlier results are kept"
    )


def test_another_machine_measures_again(settings: Settings, monkeypatch: pytest.MonkeyPatch):
    attempt, tried = curve(0, 1, 100)
    choose_batch_size("batch size", attempt, 64, settings, KEY, cuda=True)
    trials = len(tried)
    monkeypatch.setattr("platform.node", lambda: "another")
    choose_batch_size("batch size", attempt, 64, settings, KEY, cuda=True)
    assert len(tried) == 2 * trials


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1, 2]",
        "\x00\xff",
        '{"KEY": 5}',
        '{"KEY": {"batch": "many"}}',
        '{"KEY": {"batch": 0}}',
        '{"KEY": {"batch": 65}}',
        '{"KEY": {}}',
    ],
)
def test_a_damaged_cache_file_is_measured_again(settings: Settings, text: str):
    attempt, tried = curve(0, 1, 100)
    best = choose_batch_size("batch size", attempt, 64, settings, KEY, cuda=True)
    path = settings.paths.cache_root / "batch.json"
    case = path.read_text(encoding="utf-8").split('"')[1]
    path.write_text(text.replace("KEY", case), encoding="utf-8")
    tried.clear()
    assert choose_batch_size("batch size", attempt, 64, settings, KEY, cuda=True) == best and tried
    tried.clear()
    assert choose_batch_size("batch size", attempt, 64, settings, KEY, cuda=True) == best and not tried


def test_nearly_as_fast_is_fast_enough():
    trials = {4: Trial(0.04, 1, 10), 8: Trial(0.0815, 1, 10), 16: Trial(0.15, 1, 10)}
    assert smallest_fast(trials) == 16
    assert smallest_fast({size: trial for size, trial in trials.items() if size < 16}) == 4
    assert smallest_fast({4: Trial(0.041, 1, 10), 8: Trial(0.08, 1, 10)}) == 4


def make_step_of(network: nn.Module, device: torch.device, made: list[int]) -> Callable[[int], Callable[[], None]]:
    """Steps of a small network on noise."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)

    def make_step(batch_size: int) -> Callable[[], None]:
        images = torch.rand(batch_size, 3, 64, 64, device=device)

        def step() -> None:
            made.append(batch_size)
            network(images).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    return make_step


def tiny_network() -> nn.Module:
    """Two layers."""
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))


def test_a_real_network_on_the_processor(settings: Settings):
    made, device = [], torch.device("cpu")
    make_step = make_step_of(tiny_network(), device, made)
    trial = timed_attempt(make_step, 8, device)
    assert made == [8] * 7 and trial.seconds > 0 and 0 < trial.before and fits(trial)
    best = choose_batch_size(
        "batch size", lambda size: timed_attempt(make_step, size, device, runs=3), 32, settings, KEY, cuda=False
    )
    assert best in (4, 8, 16, 32)


def test_the_peak_of_a_step_counts_although_it_is_freed(settings: Settings):
    def make_step(batch_size: int) -> Callable[[], None]:
        return lambda: [torch.ones(batch_size, 2**20).mul(2) for _ in range(3)].clear()

    small, large = (timed_attempt(make_step, size, torch.device("cpu"), warmup=0, runs=3) for size in (1, 16))
    assert large.memory - small.memory > 2**26


def test_slow_steps_are_timed_once():
    made = []
    timed_attempt(lambda size: lambda: made.append(size), 4, torch.device("cpu"), warmup=3, runs=50, seconds=0.0)
    assert len(made) == 4
