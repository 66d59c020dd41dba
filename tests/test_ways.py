"""Number format, memory format and compiler of each network: measured in turns, remembered, and kept on resume."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from test_training_engine import decisions_of, stop_after, weights_hash

from pillsnap.config.load import load_settings
from pillsnap.config.schema import Settings
from pillsnap.training import loop, setup, tuning
from pillsnap.training.checkpoint import load_checkpoint
from pillsnap.training.device import ways as ways_module
from pillsnap.training.device.hardware import Hardware, Way, choose_hardware
from pillsnap.training.device.ways import (
    COMPILED_STEPS,
    MARGIN,
    Options,
    choose_way,
    compile_modes,
    fastest_way,
    memory_formats,
    number_formats,
    time_in_turns,
)
from pillsnap.training.run import train

CPU = torch.device("cpu")
EVERY = [Way(amp, memory) for amp in ("off", "bf16") for memory in ("contiguous", "channels_last")]
KEY = "a processor, a network, 160 px, 16 images, torch 2"
AUTOMATIC = ("train.amp=auto", "train.channels_last=auto", "train.classifier.epochs=2", "train.detector.epochs=2")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings whose results go into an empty folder."""
    return load_settings(profile="cpu", overrides=[f"paths.cache_root={tmp_path / 'cache'}"])


def options_on(device: str, settings: Settings, steps: int = 100) -> tuple[Options, Options, Options]:
    """What the settings leave to choose from on a device."""
    train_settings, place = settings.train, torch.device(device)
    return (
        number_formats(train_settings.amp, place),
        memory_formats(train_settings.channels_last),
        compile_modes(train_settings, place, steps),
    )


def fake(fastest: Way, calls: list[list[Way]]) -> Callable[[list[Way]], dict[Way, float]]:
    """A measurement in which one way takes 100 ms and the others 150 ms."""

    def measure(ways: list[Way]) -> dict[Way, float]:
        calls.append(ways)
        return {way: 100.0 if way == fastest else 150.0 for way in ways}

    return measure


@pytest.mark.parametrize("winner", EVERY)
def test_the_fastest_way_wins_and_each_choice_is_a_decision(
    settings: Settings, winner: Way, caplog: pytest.LogCaptureFixture
):
    calls: list[list[Way]] = []
    with caplog.at_level(logging.INFO, logger="pillsnap"):
        assert choose_way("detector", options_on("cpu", settings), fake(winner, calls), settings, KEY) == winner
    assert calls == [EVERY]
    amp, memory, compiled = (record.getMessage() for record in caplog.records)
    assert amp.startswith(f"detector amp: {'float32' if winner.amp == 'off' else winner.amp} (")
    assert memory.startswith(f"detector memory format: {winner.memory_format} (")
    assert all(f"ms in {way}" in amp and f"ms in {way}" in memory for way in EVERY) and "100 ms" in amp
    assert compiled.startswith("detector compile mode: none (train.compile is none")


@pytest.mark.parametrize("mode", ["none", "default", "reduce-overhead"])
def test_the_compiler_is_tried_on_the_fastest_way_alone(mode: str, settings: Settings, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    settings = settings.model_copy(update={"train": settings.train.model_copy(update={"compile": "auto"})})
    options, calls = options_on("cuda", settings, COMPILED_STEPS), []

    def measure(ways: list[Way]) -> dict[Way, float]:
        calls.append(ways)
        return {way: 100.0 - 20 * (way.amp == "fp16") - 20 * (way.compile_mode == mode != "none") for way in ways}

    assert choose_way("classifier", options, measure, settings, KEY) == Way("fp16", "contiguous", mode)
    assert [len(ways) for ways in calls] == [6, 3] and {way[:2] for way in calls[1]} == {("fp16", "contiguous")}
    assert choose_way("classifier", options, measure, settings, KEY).compile_mode == mode and len(calls) == 2, "cached"


def test_compiling_is_not_tried_where_it_does_not_pay(settings: Settings):
    automatic = settings.train.model_copy(update={"compile": "auto"})
    gpu = torch.device("cuda")
    assert compile_modes(automatic, CPU, 10 * COMPILED_STEPS).names == ("none",)
    assert compile_modes(automatic, gpu, COMPILED_STEPS - 1).names == ("none",)
    assert compile_modes(automatic, gpu, COMPILED_STEPS).names == ("none", "default", "reduce-overhead")
    assert compile_modes(automatic, gpu, COMPILED_STEPS, several=True).names == ("none", "default")
    graphs = automatic.model_copy(update={"cuda_graphs": True})
    assert compile_modes(graphs, gpu, COMPILED_STEPS).names == ("none",)
    named = settings.train.model_copy(update={"compile": "max-autotune"})
    assert compile_modes(named, CPU, 1).names == ("max-autotune",), "a named mode is obeyed"


def test_a_way_must_be_clearly_faster_than_a_plainer_one():
    plain, last, half = Way(), Way("off", "channels_last"), Way("bf16")
    assert fastest_way({plain: 100 * MARGIN, last: 100.0}) == plain
    assert fastest_way({plain: 100 * MARGIN + 0.1, last: 100.0}) == last
    assert fastest_way({plain: 120.0, last: 101.0, half: 100.0}) == last
    randoms = random.Random(5)
    for _ in range(100):
        milliseconds = {way: randoms.uniform(90, 110) for way in EVERY}
        assert milliseconds[fastest_way(milliseconds)] <= MARGIN * min(milliseconds.values())


def test_a_cached_choice_is_reused_for_the_same_case_only(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    options, calls, winner = options_on("cpu", settings), [], Way("bf16", "channels_last")
    caplog.set_level(logging.INFO, logger="pillsnap")
    for _ in range(2):
        assert choose_way("detector", options, fake(winner, calls), settings, KEY) == winner
    assert len(calls) == 1
    lines = [record.getMessage() for record in caplog.records if "detector amp" in record.getMessage()]
    assert "measured earlier" not in lines[0] and "measured earlier" in lines[1] and "100 ms" in lines[1]
    assert choose_way("detector", options, fake(Way(), calls), settings, KEY.replace("16 images", "8 images")) == Way()
    contiguous = (options[0], memory_formats(False), options[2])
    assert choose_way("detector", contiguous, fake(Way(), calls), settings, KEY) == Way(), "other options are measured"
    monkeypatch.setattr("platform.node", lambda: "another machine")
    assert choose_way("detector", options, fake(Way(), calls), settings, KEY) == Way() and len(calls) == 4
    monkeypatch.undo()
    assert choose_way("detector", options, fake(Way(), calls), settings, KEY) == winner and len(calls) == 4


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        '{"KEY": 5}',
        '{"KEY": {"way": ["off"], "measured": {}}}',
        '{"KEY": {"way": ["fp16", "contiguous", "none"], "measured": {}}}',
        '{"KEY": {"way": ["off", "contiguous", "none"]}}',
    ],
)
def test_a_damaged_cache_is_measured_again(settings: Settings, text: str):
    options, calls, path = options_on("cpu", settings), [], settings.paths.cache_root / "ways.json"
    choose_way("detector", options, fake(EVERY[1], calls), settings, KEY)
    case = next(iter(json.loads(path.read_text())))
    path.write_text(text.replace('"KEY"', json.dumps(case)))
    assert choose_way("detector", options, fake(EVERY[1], calls), settings, KEY) == EVERY[1] and len(calls) == 2
    assert choose_way("detector", options, fake(Way(), calls), settings, KEY) == EVERY[1] and len(calls) == 2


def test_named_values_are_obeyed_and_not_measured(settings: Settings, caplog: pytest.LogCaptureFixture):
    for amp, channels_last, way, warnings in (
        ("bf16", True, Way("bf16", "channels_last"), 0),
        ("off", False, Way(), 0),
        ("fp16", False, Way(), 1),
    ):
        caplog.clear()
        named = settings.model_copy(
            update={"train": settings.train.model_copy(update={"amp": amp, "channels_last": channels_last})}
        )
        calls: list[list[Way]] = []
        with caplog.at_level(logging.INFO, logger="pillsnap"):
            assert choose_way("detector", options_on("cpu", named), fake(way, calls), named, KEY) == way
        assert not calls and not (settings.paths.cache_root / "ways.json").exists()
        assert [record.levelname for record in caplog.records].count("WARNING") == warnings


def test_ways_take_turns_and_those_without_memory_are_left_out():
    made: list[Way] = []

    def make_step(way: Way) -> Callable[[], None] | None:
        def step() -> None:
            made.append(way)
            if way == EVERY[2] and made.count(way) == 3:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        if way == EVERY[3]:
            raise MemoryError
        return None if way == EVERY[1] else step

    milliseconds = time_in_turns(EVERY, make_step, CPU)
    assert list(milliseconds) == [EVERY[0]] and made.count(EVERY[0]) == 6
    assert made[:4] == [EVERY[0], EVERY[2], EVERY[2], EVERY[0]], "each round begins with another way"


def test_a_way_that_fails_for_another_reason_is_an_error():
    def make_step(way: Way) -> Callable[[], None]:
        raise RuntimeError("The size of tensor a must match the size of tensor b")

    with pytest.raises(RuntimeError, match="size of tensor"):
        time_in_turns(EVERY, make_step, CPU)


def test_no_round_begins_after_the_time_is_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ways_module, "_SECONDS", 0.0)
    made: list[Way] = []
    time_in_turns(EVERY, lambda way: lambda: made.append(way), CPU)
    assert made.count(EVERY[0]) == 2, "one round to warm up and one that is timed"


def test_without_memory_for_any_way_the_plainest_is_taken_with_a_warning(
    settings: Settings, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO, logger="pillsnap"):
        way = choose_way("detector", options_on("cpu", settings), lambda ways: {}, settings, KEY)
    assert way == Way() and not (settings.paths.cache_root / "ways.json").exists()
    assert [record.levelname for record in caplog.records][:2] == ["WARNING", "WARNING"]


def pretend(monkeypatch: pytest.MonkeyPatch, fastest: dict[int, Way], really: bool = False) -> list[int]:
    """Networks whose fastest way is given by the images of their step; returns the sizes measured.

    With `really` the steps are made, and their times are ignored.
    """
    real, measured = tuning.measured_ways, []

    def measure(ways: list[Way], make: Callable[..., object], count: int, hardware: Hardware) -> dict[Way, float]:
        assert not really or real(ways, make, count, hardware).keys() == set(ways)
        measured.append(count)
        return {way: 100.0 if way == fastest[count] else 150.0 for way in ways}

    monkeypatch.setattr(tuning, "measured_ways", measure)
    return measured


def test_each_network_has_its_own_way_and_a_resumed_run_keeps_it(
    tiny_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cached = f"paths.cache_root={tmp_path / 'cache'}"
    detector, classifier = Way("bf16", "contiguous"), Way("off", "channels_last")
    measured = pretend(monkeypatch, {4: detector, 8: classifier})
    whole = train(tiny_settings(*AUTOMATIC, cached), tmp_path / "whole")
    assert measured == [4, 8]
    decisions = decisions_of(whole)
    assert (decisions["detector amp"]["choice"], decisions["classifier amp"]["choice"]) == ("bf16", "float32")
    assert all("ms in" in decisions[f"{name} amp"]["reason"] for name in ("detector", "classifier"))
    assert decisions["classifier memory format"]["choice"] == "channels_last"
    states = load_checkpoint(whole / "last.pt")["tasks"]
    assert Way(*states["detector"]["way_at_start"]) == detector and states["detector"]["amp"] == "bf16"
    assert Way(*states["classifier"]["way_at_start"]) == classifier and states["classifier"]["amp"] == "off"
    for state, memory_format in (
        (states["detector"], torch.contiguous_format),
        (states["classifier"], torch.channels_last),
    ):
        kernels = [tensor for tensor in state["network"].values() if tensor.dim() == 4 and min(tensor.shape) > 1]
        assert kernels and all(kernel.is_contiguous(memory_format=memory_format) for kernel in kernels)

    with monkeypatch.context() as patch:
        stop_after(5, patch)
        with pytest.raises(loop.Stopped):
            train(tiny_settings(*AUTOMATIC, cached), tmp_path / "stopped")
    (tmp_path / "cache" / "ways.json").unlink()
    resumed = train(tiny_settings(*AUTOMATIC, cached, "train.resume=last"), tmp_path / "stopped")
    assert measured == [4, 8], "neither the second run nor the resumed one measured"
    assert decisions_of(resumed)["detector way"]["choice"] == str(detector)
    assert weights_hash(resumed) == weights_hash(whole)


def test_measuring_changes_no_result(
    tiny_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pretend(monkeypatch, {4: Way("off", "channels_last"), 8: Way("off", "channels_last")}, really=True)
    named = train(tiny_settings("train.amp=off", "train.channels_last=true"), tmp_path / "named")
    measured = train(tiny_settings("train.amp=auto", "train.channels_last=auto"), tmp_path / "measured")
    assert weights_hash(measured) == weights_hash(named)


def test_real_networks_are_measured_and_left_as_they_were(tiny_settings: Callable[..., Settings], tmp_path: Path):
    from pillsnap.data.manifest import prepare_data

    settings = tiny_settings(*AUTOMATIC, f"paths.cache_root={tmp_path / 'cache'}")
    dataset = prepare_data(settings, settings.paths.data_root)
    tasks: list[dict[str, object]] = []
    states: list[tuple[object, ...]] = []
    for _ in range(2):
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)
        tasks.append(setup.build_tasks(dataset, settings, choose_hardware(settings))[0])
        states.append((torch.rand(1).item(), random.random(), np.random.rand()))
    assert states[0] == states[1], "the generators are where they are without a measurement"
    first, again = tasks
    for name in ("detector", "classifier"):
        assert first[name].hardware == again[name].hardware and first[name].progress.step == 0
        before, after = (task[name].network.state_dict() for task in tasks)
        assert all(torch.equal(before[key], after[key]) for key in before)
        entry = [
            entry
            for case, entry in json.loads((tmp_path / "cache" / "ways.json").read_text()).items()
            if f"{first[name].samples.store.size} px" in case
        ]
        assert [Way(*found["way"]) for found in entry] == [first[name].hardware.way()]
        assert entry[0]["measured"]["amp"].count(" ms in ") == 4


def test_the_memory_ladder_starts_from_the_way_of_each_network(
    tiny_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from pillsnap.data.manifest import prepare_data

    settings = tiny_settings(*AUTOMATIC, f"paths.cache_root={tmp_path / 'cache'}")
    pretend(monkeypatch, {4: Way("bf16"), 8: Way()})
    dataset = prepare_data(settings, settings.paths.data_root)
    tasks = setup.build_tasks(dataset, settings, choose_hardware(settings))[0]
    actions = {}
    for name, task in tasks.items():
        task.ladder.next_action(0)
        actions[name] = task.ladder.next_action(0).kind
    assert actions == {"detector": "grad_accum", "classifier": "half precision"}


def test_a_resumed_way_fits_the_machine_and_a_named_compiler_mode(settings: Settings, caplog: pytest.LogCaptureFixture):
    began, machine = Way("fp16", "channels_last", "default"), Hardware(CPU, None, torch.contiguous_format, "none")
    with caplog.at_level(logging.INFO, logger="pillsnap"):
        assert tuning.resumed_way("detector", began, settings, machine) == Way("off", "channels_last", "none")
    assert caplog.records[-1].levelname == "WARNING" and "began with fp16" in caplog.records[-1].getMessage()
    automatic = settings.model_copy(update={"train": settings.train.model_copy(update={"compile": "auto"})})
    bf16 = began._replace(amp="bf16")
    assert tuning.resumed_way("detector", bf16, automatic, machine) == bf16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_real_networks_on_a_gpu(tiny_settings: Callable[..., Settings], tmp_path: Path):
    from pillsnap.data.manifest import prepare_data

    settings = tiny_settings(*AUTOMATIC, f"paths.cache_root={tmp_path / 'cache'}")
    dataset = prepare_data(settings, settings.paths.data_root)
    hardware = choose_hardware(settings)
    tasks = setup.build_tasks(dataset, settings, hardware)[0]
    found = json.loads((tmp_path / "cache" / "ways.json").read_text())
    assert all(entry["measured"]["amp"].count(" ms in ") == 6 for entry in found.values()) and len(found) == 2

    def make(count: int, own: Hardware) -> object:
        return setup.build_tasks(
            dataset,
            settings.model_copy(
                update={
                    "train": settings.train.model_copy(
                        update={"amp": "bf16", "channels_last": True, "compile": own.compile_mode, "only": "classifier"}
                    )
                }
            ),
            hardware,
        )[0]["classifier"]

    ways = [Way("bf16", "channels_last", mode) for mode in ("none", "default", "reduce-overhead")]
    milliseconds = tuning.measured_ways(ways, make, 8, hardware)
    assert list(milliseconds) == ways and all(taken > 0 for taken in milliseconds.values())
    assert tasks["detector"].hardware.device.type == "cuda"
