"""Memory ladder: every out-of-memory error is recognised, and actions are taken one at a time."""

from __future__ import annotations

import io
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from pillsnap.training.device.memory_ladder import Action, MemoryLadder, free_memory, give_up_message, is_out_of_memory


def caught(function: Callable[[], object]) -> BaseException:
    """The error that a function raises."""
    try:
        function()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def actions_of_step(ladder: MemoryLadder, step: int = 1) -> list[tuple[str, int | None]]:
    """Kinds and values of all actions of a step that never succeeds."""
    taken = []
    while not taken or taken[-1][0] != "give up":
        action = ladder.next_action(step)
        taken.append((action.kind, action.to))
    return taken


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.92 GiB",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA driver error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 400 bytes. Error code 12 (Cannot allocate memory)",
        "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: "
        "you tried to allocate 400 bytes.",
    ],
)
def test_messages_of_out_of_memory_errors(text: str):
    assert is_out_of_memory(RuntimeError(text))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        ValueError("out of memory"),
        KeyboardInterrupt(),
        StopIteration(),
    ],
)
def test_other_errors(error: BaseException):
    assert not is_out_of_memory(error)


def test_real_out_of_memory_errors():
    assert is_out_of_memory(caught(lambda: torch.empty(2**58)))
    assert is_out_of_memory(caught(lambda: np.empty(2**58)))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))


def test_errors_caused_by_a_lack_of_memory():
    def compiled() -> None:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        except RuntimeError as error:
            raise ValueError("the backend failed") from error

    def cleaning_up() -> None:
        try:
            compiled()
        finally:
            raise KeyError("left over")

    def reported_from_none() -> None:
        try:
            compiled()
        except ValueError:
            raise ValueError("Use a smaller network.") from None

    def interrupted() -> None:
        try:
            compiled()
        finally:
            raise KeyboardInterrupt

    assert is_out_of_memory(caught(compiled)) and is_out_of_memory(caught(cleaning_up))
    assert not is_out_of_memory(caught(reported_from_none)) and not is_out_of_memory(caught(interrupted))


def test_errors_that_cause_each_other_end_the_search():
    first, second = KeyError("first"), KeyError("second")
    first.__context__, second.__context__ = second, first
    assert not is_out_of_memory(first)


def test_freeing_memory_needs_no_gpu():
    free_memory(torch.device("cpu"))
    free_memory(torch.device("cuda"))


def test_all_actions_in_order():
    ladder = MemoryLadder(half=False, micro_batches=1, batch=16, max_micro_batches=4)
    assert actions_of_step(ladder) == [
        ("empty_cache", None),
        ("half precision", None),
        ("grad_accum", 2),
        ("grad_accum", 3),
        ("grad_accum", 4),
        ("batch_size", 8),
        ("batch_size", 4),
        ("batch_size", 2),
        ("batch_size", 1),
        ("give up", None),
    ]
    assert (ladder.half, ladder.micro_batches, ladder.batch) == (True, 1, 1)
    assert ladder.next_action(1).kind == "give up", "giving up is final"


def test_half_precision_in_use_is_skipped_and_the_event_has_the_reason():
    ladder = MemoryLadder(half=True, micro_batches=1, batch=4, max_micro_batches=2)
    assert actions_of_step(ladder) == [
        ("empty_cache", None),
        ("grad_accum", 2),
        ("batch_size", 2),
        ("batch_size", 1),
        ("give up", None),
    ]
    assert ["half precision is in use already" in event["reason"] for event in ladder.history] == [
        False,
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize(
    "batch, max_micro_batches, expected",
    [
        (1, 8, ["empty_cache", "give up"]),
        (8, 1, ["empty_cache", "batch_size", "batch_size", "batch_size", "give up"]),
        (2, 8, ["empty_cache", "grad_accum", "batch_size", "give up"]),
        (3, 8, ["empty_cache", "grad_accum", "grad_accum", "batch_size", "give up"]),
    ],
)
def test_micro_batches_are_never_more_than_images_or_than_allowed(
    batch: int, max_micro_batches: int, expected: list[str]
):
    assert [kind for kind, _ in actions_of_step(MemoryLadder(True, 1, batch, max_micro_batches))] == expected


def test_every_ladder_ends_within_its_bounds():
    random_numbers = random.Random(42)
    for _ in range(200):
        batch, most = random_numbers.randint(1, 300), random_numbers.randint(1, 40)
        ladder = MemoryLadder(random_numbers.random() < 0.5, random_numbers.randint(1, min(batch, most)), batch, most)
        for step in range(400):
            before = (ladder.half, ladder.micro_batches, ladder.batch)
            action = ladder.next_action(step)
            assert 1 <= ladder.micro_batches <= min(most, ladder.batch)
            assert (action.kind in ("empty_cache", "give up")) == (
                before == (ladder.half, ladder.micro_batches, ladder.batch)
            ), "every other action changes something"
            assert action.to == {"grad_accum": ladder.micro_batches, "batch_size": ladder.batch}.get(action.kind)
            if action.kind == "give up":
                break
            if random_numbers.random() < 0.3:
                ladder.succeeded()
        assert action.kind == "give up" and ladder.batch == 1


def test_a_later_step_begins_with_an_empty_cache_and_keeps_the_sizes_reached():
    ladder = MemoryLadder(half=False, micro_batches=1, batch=8, max_micro_batches=2)
    kinds = [ladder.next_action(10).kind for _ in range(4)]
    assert kinds == ["empty_cache", "half precision", "grad_accum", "batch_size"] == ladder.tried
    ladder.succeeded()
    assert ladder.tried == [] and (ladder.half, ladder.micro_batches, ladder.batch) == (True, 2, 4)
    assert [(action.kind, action.to) for action in (ladder.next_action(25), ladder.next_action(25))] == [
        ("empty_cache", None),
        ("batch_size", 2),
    ]
    assert [(event["step"], event["action"]) for event in ladder.history][-2:] == [
        (25, "empty_cache"),
        (25, "batch_size"),
    ]


def test_half_precision_is_tried_once_per_run():
    ladder = MemoryLadder(half=False, micro_batches=1, batch=8, max_micro_batches=8)
    for step in range(5):
        for _ in range(3):
            ladder.next_action(step)
        ladder.succeeded()
    assert [event["action"] for event in ladder.history].count("half precision") == 1


def test_a_restored_ladder_continues_the_run():
    ladder = MemoryLadder(half=False, micro_batches=1, batch=8, max_micro_batches=2)
    for _ in range(4):
        ladder.next_action(3)
    file = io.BytesIO()
    torch.save({"ladder": ladder.state()}, file)
    file.seek(0)
    restored = MemoryLadder(half=False, micro_batches=1, batch=8, max_micro_batches=2)
    restored.next_action(0)
    restored.restore(torch.load(file, weights_only=True)["ladder"])
    ladder.succeeded()
    assert restored == ladder
    assert actions_of_step(restored, 9) == [
        ("empty_cache", None),
        ("batch_size", 2),
        ("batch_size", 1),
        ("give up", None),
    ]


def test_a_state_does_not_change_with_its_ladder():
    ladder = MemoryLadder(half=True, micro_batches=1, batch=8, max_micro_batches=2)
    ladder.next_action(1)
    state = ladder.state()
    ladder.next_action(1)
    assert len(state["history"]) == 1 and state["pieces"] == 1
    other = MemoryLadder(half=True, micro_batches=1, batch=8, max_micro_batches=2)
    other.restore(state)
    other.next_action(2)
    assert len(state["history"]) == 1


def test_the_final_message_names_actions_of_this_step_and_remedies():
    ladder = MemoryLadder(half=False, micro_batches=1, batch=4, max_micro_batches=2)
    for _ in range(3):
        ladder.next_action(1)
    ladder.succeeded()
    actions_of_step(ladder, 50)
    message = give_up_message("classifier", ladder)
    assert "(tried: empty_cache, batch_size 1)" in message, "half precision and micro-batches belong to an earlier step"
    for hint in (
        "model.classifier.image_size",
        "model.classifier.name",
        "train.compile=none",
        "other programs on the GPU",
        "train.resume=last",
    ):
        assert hint in message
    assert message.count(". ") == 0 and message.endswith(".")


def test_actions_are_plain_data():
    action = MemoryLadder(True, 1, 2, 2).next_action(0)
    assert action == Action("empty_cache", None, action.reason) and action.reason
