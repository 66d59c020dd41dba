"""What a GPU has to get right, with networks that take seconds: number formats, memory, compiler, processes.

`make gpu-check` runs this file on a card. It stands alone (no fixtures of conftest.py, no dataset), because a machine
with a card may hold little more than torch. What makes sense on a processor runs there too, so that its code is known
to work before a card is at hand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

from pillsnap.bench.gpu.pictures import drawn_samples
from pillsnap.bench.gpu.ways import CLASSES, drawn_task, settings_of_way
from pillsnap.config.load import load_settings
from pillsnap.config.schema import Settings
from pillsnap.data.augment import augment_crops, augment_photos
from pillsnap.runlog import open_run
from pillsnap.training import step as steps
from pillsnap.training.checkpoint import load_checkpoint, save_checkpoint
from pillsnap.training.device.autotune import HEADROOM, choose_batch_size, fits, timed_attempt
from pillsnap.training.device.distributed import ALONE, ProcessGroup
from pillsnap.training.device.hardware import Hardware
from pillsnap.training.device.memory_ladder import free_memory, is_out_of_memory
from pillsnap.training.step import step_on, synthetic_batch, train_step
from pillsnap.training.tasks import Task
from pillsnap.training.tuning import tuned_batch_size

pytestmark = pytest.mark.gpu

needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no NVIDIA card")
on_card = pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_card)])
anywhere = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_card)])
SIZE = 64


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Tiny networks."""
    return load_settings(
        profile="cpu",
        overrides=[
            "model.classifier.name=test_efficientnet",
            f"model.classifier.image_size={SIZE}",
            "model.classifier.pretrained=false",
            "model.classifier.drop_rate=0",
            "model.detector.name=yolo11n.yaml",
            f"model.detector.image_size={SIZE}",
            "dataloader.num_workers=0",
            "train.classifier.lr=0.01",
            f"paths.cache_root={tmp_path / 'cache'}",
        ],
    )


@pytest.fixture(autouse=True)
def free_the_card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test begins with an empty card and with exact sums; tiny networks are slower with several threads."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    free_memory(torch.device("cuda"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def place(device: str, amp: torch.dtype | None = None, compile_mode: str = "none", graphs: bool = False) -> Hardware:
    """Hardware as `choose_hardware` would give it."""
    return Hardware(torch.device(device), amp, torch.contiguous_format, compile_mode, graphs)


def task_on(
    hardware: Hardware,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    name: str = "classifier",
    size: int = SIZE,
    batch: int = 4,
) -> Task:
    """A tiny task on given hardware."""
    monkeypatch.setattr("pillsnap.bench.gpu.ways.named_hardware", lambda name, settings: hardware)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return drawn_task(name, drawn_samples(name, 16, size, CLASSES), settings_of_way(settings, "float32"), batch)


def losses_of(task: Task, folder: Path, count: int = 3) -> list[float]:
    """The losses of the next steps."""
    with open_run(folder, task.settings) as run:
        return [float(train_step(task, ALONE, run).loss) for _ in range(count)]


# Number formats and memory formats


@anywhere
@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16], ids=["float32", "bf16", "fp16"])
def test_every_number_format_learns(
    device: str, amp: torch.dtype | None, settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    task = task_on(place(device, amp), settings, monkeypatch)
    assert task.scaler.is_enabled() == (amp is torch.float16)
    task.progress.seen = task.total // 2  # at the top of the learning rate
    batch = synthetic_batch(task, 4)
    for rates in task.optimizer.param_groups:
        rates["lr"] = 0.01
    losses = [float(step_on(task, batch)) for _ in range(12)]
    assert min(losses[-3:]) < 0.8 * losses[0]
    assert {parameter.dtype for parameter in task.network.parameters()} == {torch.float32}


@anywhere
def test_the_scaler_passes_over_a_step_that_overflows(device: str, settings: Settings, monkeypatch: pytest.MonkeyPatch):
    task = task_on(place(device, torch.float16), settings, monkeypatch)
    task.scaler = torch.amp.GradScaler(device, init_scale=2.0**40)
    before = copy.deepcopy(task.network.state_dict()["body.conv_stem.weight"])
    step_on(task, synthetic_batch(task, 4))
    assert torch.equal(task.network.state_dict()["body.conv_stem.weight"], before) and task.scaler.get_scale() < 2.0**40


@anywhere
@pytest.mark.parametrize("name", ["classifier", "detector"])
def test_channels_last_computes_the_same(device: str, name: str, settings: Settings, monkeypatch: pytest.MonkeyPatch):
    losses = []
    for layout in (torch.contiguous_format, torch.channels_last):
        task = task_on(replace(place(device), memory_format=layout), settings, monkeypatch, name)
        wide = next(weight for weight in task.network.parameters() if weight.dim() == 4 and weight.shape[1] > 1)
        assert wide.is_contiguous(memory_format=layout)
        losses.append(float(step_on(task, synthetic_batch(task, 4))))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


# Augmentation


@anywhere
def test_crops_are_augmented_as_on_the_processor(device: str):
    crops = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    expected = augment_crops(crops, torch.Generator().manual_seed(2))
    strided = crops.to(device).contiguous(memory_format=torch.channels_last)  # as a batch arrives
    found = augment_crops(strided, torch.Generator().manual_seed(2)).cpu()
    assert (found - expected).abs().mean() < 1e-3 and (found - expected).abs().max() < 0.05


@anywhere
def test_photos_are_augmented_as_on_the_processor(device: str):
    samples = drawn_samples("detector", 4, SIZE, 0)
    photos = torch.from_numpy(samples.store.pixels).permute(0, 3, 1, 2).contiguous()
    boxes = [samples.boxes_of(number) for number in range(4)]
    expected, expected_boxes = augment_photos(photos, boxes, torch.Generator().manual_seed(2))
    # a card resizes floats; so does a processor that gets them
    given = photos.to(device) if device == "cuda" else photos.float()
    found, found_boxes = augment_photos(given, boxes, torch.Generator().manual_seed(2))
    assert (found.cpu() - expected).abs().mean() < 0.01
    assert all(torch.allclose(one.cpu(), other) for one, other in zip(found_boxes, expected_boxes))


# Memory


def filled_card(device: torch.device, free: int) -> torch.Tensor:
    """Memory that is taken, so that about `free` bytes are left."""
    free_memory(device)
    return torch.empty(torch.cuda.mem_get_info(device)[0] - free, dtype=torch.uint8, device=device)


@on_card
def test_a_card_without_memory_is_recognised_and_freed(device: str):
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(2**46, device=device)
    assert is_out_of_memory(caught.value)
    block = torch.empty(2**28, dtype=torch.uint8, device=device)
    del block
    before = torch.cuda.memory_reserved(device)
    free_memory(torch.device(device))
    assert torch.cuda.memory_reserved(device) <= before - 2**28


@anywhere
def test_a_step_that_ran_out_of_memory_is_made_again_with_the_same_result(
    device: str, settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    expected = losses_of(task_on(place(device, torch.bfloat16), settings, monkeypatch), tmp_path / "whole")
    task = task_on(place(device, torch.bfloat16), settings, monkeypatch)
    held = [filled_card(task.hardware.device, 2**26)] if device == "cuda" else [torch.empty(1)]
    plain, free = task.prepare, steps.free_memory

    def prepare(batch, generator):
        if held and device == "cuda":
            torch.empty(2**30, dtype=torch.uint8, device=device)  # more than is left
        elif held:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(batch, generator)

    def free_and_let_go(where: torch.device) -> None:
        held.clear()
        free(where)

    task.prepare = prepare
    monkeypatch.setattr(steps, "free_memory", free_and_let_go)
    assert losses_of(task, tmp_path / "run") == pytest.approx(expected, rel=1e-3)
    assert [event["action"] for event in task.ladder.history] == ["empty_cache"]


@anywhere
def test_training_climbs_the_ladder_and_goes_on(
    device: str, settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """A batch that does not fit is computed in parts, of the same samples in the same order."""
    task = task_on(place(device, torch.bfloat16), settings, monkeypatch)
    block = (torch.cuda.mem_get_info()[0] if device == "cuda" else 2**20) // 3
    held, plain = [], task.prepare

    def prepare(batch, generator):
        held.clear()
        if device == "cuda":
            held.append(torch.empty(len(batch) * block, dtype=torch.uint8, device=device))  # 4 images: more than it has
        elif len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(batch, generator)

    task.prepare = prepare
    with open_run(tmp_path / "run", task.settings) as run:
        measured = [train_step(task, ALONE, run) for _ in range(2)]
    actions = [event["action"] for event in task.ladder.history]
    assert actions[:2] == ["empty_cache", "grad_accum"] and task.ladder.micro_batches >= 2
    assert (task.progress.seen, task.progress.step) == (8, 2) and all(torch.isfinite(step.loss) for step in measured)
    numbers = [number for step in measured for number in step.numbers.tolist()]
    undisturbed = task_on(place(device, torch.bfloat16), settings, monkeypatch)
    with open_run(tmp_path / "whole", task.settings) as run:
        whole = [number for _ in range(2) for number in train_step(undisturbed, ALONE, run).numbers.tolist()]
    assert numbers == whole


@on_card
def test_a_batch_is_as_large_as_the_memory_allows(device: str, settings: Settings):
    block = torch.cuda.mem_get_info(device)[0] // 30

    def make_step(batch_size: int) -> Callable[[], None]:
        return lambda: torch.empty(batch_size * block, dtype=torch.uint8, device=device).zero_()

    where = torch.device(device)
    best = choose_batch_size("batch size", lambda size: timed_attempt(make_step, size, where), 160, settings, "", True)
    assert best == 24
    assert torch.empty(20 * block, dtype=torch.uint8, device=device).numel(), "the memory of the failed trials is freed"


@on_card
def test_a_trial_does_not_count_the_memory_of_an_earlier_one(device: str, settings: Settings):
    network = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)).to(device)
    where = torch.device(device)

    def make_step(count: int) -> Callable[[], None]:
        images = torch.zeros(count, 3, SIZE, SIZE, device=where)
        return lambda: network(images).sum().backward()

    trials = [timed_attempt(make_step, size, where) for size in (64, 2048, 64)]
    assert all(fits(trial) for trial in trials)
    assert trials[0].memory < trials[1].memory and trials[2].memory < trials[1].memory


@on_card
def test_the_tuned_batch_of_a_network_stays_within_the_headroom(
    device: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    """Of a card that has 2 GB for this process."""
    room, total = 2**31, torch.cuda.get_device_properties(device).total_memory
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (room - torch.cuda.memory_reserved(), total))
    monkeypatch.setattr(
        "pillsnap.training.tuning.timed_attempt",
        lambda make_step, count, where: timed_attempt(make_step, count, where, 2, 2),
    )
    half = place(device, torch.bfloat16)

    def task_of(count: int, hardware: Hardware = half) -> Task:
        return task_on(hardware, settings, monkeypatch, "detector", 256, count)

    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        best = tuned_batch_size("detector", task_of, settings, half)
        task = task_of(best)
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(3):
            step_on(task, synthetic_batch(task, best))
        assert best > 1 and torch.cuda.max_memory_reserved(device) <= HEADROOM * room
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# Going on, and several processes


@anywhere
@pytest.mark.parametrize("amp", [None, torch.float16], ids=["float32", "fp16"])
def test_a_resumed_task_goes_on_as_if_nothing_had_happened(
    device: str, amp: torch.dtype | None, settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    whole = losses_of(task_on(place(device, amp), settings, monkeypatch), tmp_path / "whole", 6)
    first = task_on(place(device, amp), settings, monkeypatch)
    losses_of(first, tmp_path / "run", 3)
    save_checkpoint(first.state(), tmp_path / "last.pt")
    second = task_on(place(device, amp), settings, monkeypatch)
    second.restore(load_checkpoint(tmp_path / "last.pt"))
    assert losses_of(second, tmp_path / "run", 3) == pytest.approx(whole[3:], rel=1e-3)
    assert second.scaler.get_scale() == first.scaler.get_scale()


@anywhere
def test_the_backend_of_several_processes_works_with_one(device: str, tmp_path: Path):
    """NCCL on a card: a group that counts itself as two calls the backend, which has one process."""
    backend = "nccl" if device == "cuda" else "gloo"
    distributed.init_process_group(backend, init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        group = ProcessGroup(0, 2)
        gradients = [torch.full((3, 2), 2.0, device=device), torch.ones(5, device=device)]
        group.add(gradients)
        assert [tensor.sum().item() for tensor in gradients] == [12.0, 5.0]
        assert group.any(True) and not group.any(False) and group.first(lambda: "made once") == "made once"
    finally:
        distributed.destroy_process_group()


# Compiler and CUDA graphs: the compiler takes longest, so it comes last


@on_card
@pytest.mark.parametrize("amp", [None, torch.bfloat16], ids=["float32", "bf16"])
def test_cuda_graphs_compute_the_same(
    device: str, amp: torch.dtype | None, settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    eager = losses_of(task_on(place(device, amp), settings, monkeypatch), tmp_path / "eager")
    task = task_on(place(device, amp, graphs=True), settings, monkeypatch)
    assert "forward" in vars(task.network), "the recording fell back to the plain network"
    assert losses_of(task, tmp_path / "graphs") == pytest.approx(eager, rel=2e-2)


@on_card
@pytest.mark.parametrize("mode", ["reduce-overhead", "default", "max-autotune"])
def test_a_compiled_network_computes_the_same(
    device: str, mode: str, settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    eager = losses_of(task_on(place(device), settings, monkeypatch), tmp_path / "eager")
    task = task_on(place(device, compile_mode=mode), settings, monkeypatch)
    assert task.forward is not None, "the compiler fell back to the plain network"
    assert losses_of(task, tmp_path / mode) == pytest.approx(eager, rel=2e-2)
