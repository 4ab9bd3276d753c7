"""Invariant C11 where no fence holds training back: the save is refused, or its capture was faster than the change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dscheck import Checkpointer
from dscheck.errors import TornSnapshotError
from dscheck.storage.memory import MemoryStorage
from tests.snapshot.training import Job, adamw, differences, image

pytestmark = pytest.mark.filterwarnings("ignore:dscheck:RuntimeWarning")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NUMEL = 5_600_000
"""Of one parameter: 64 MiB with two moments, which no capture has copied before the next line of the test runs."""
TRIES = 3


def alone(make: Callable[[list[nn.Parameter]], Any], device: str, dtype: torch.dtype = torch.float32) -> Job:
    """One parameter with a random gradient under one optimizer."""
    weight = nn.Parameter(torch.randn(NUMEL // 700, 700, device=device, dtype=dtype))
    weight.grad = torch.randn_like(weight)
    optimizer = make([weight])
    return Job({"weight": weight, "optimizer": optimizer}, optimizer.step)


def in_bfloat16(device: str) -> Job:
    """A step changes 8 to 16% of the elements of the weight (TRAPS 19), and moves no version counter (TRAPS 17)."""
    return alone(lambda p: torch.optim.AdamW(p, lr=1e-5, fused=True), device, torch.bfloat16)


def sparse(device: str) -> Job:
    """A step changes 100 of 20,000 rows (TRAPS 19)."""
    model = nn.Embedding(20_000, 280, sparse=True).to(device)
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randint(0, 20_000, (100,), device=device)).sum().backward()
        optimizer.step()

    return Job({"model": model, "optimizer": optimizer}, step)


def without_hooks(device: str) -> Job:
    """A training step by hand, past every optimizer and version counter (TRAPS 17)."""
    weight = nn.Parameter(torch.randn(3 * NUMEL, device=device))

    def step() -> None:
        weight.data.add_(1.0)

    return Job({"weight": weight}, step)


KINDS: dict[str, Callable[[str], Job]] = {
    "fused": lambda device: alone(adamw(fused=True), device),
    "foreach": lambda device: alone(adamw(foreach=True), device),
    "plain": lambda device: alone(adamw(foreach=False, fused=False), device),
    "sgd": lambda device: alone(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), device),
    "bfloat16": in_bfloat16,
    "sparse": sparse,
    "without-hooks": without_hooks,
}


def saved_or_refused(job: Job, change: Callable[[], None]) -> bool:
    """Whether a save during which `change` happened unfenced was refused; False when it committed its own moment."""
    root = MemoryStorage()
    ckpt = Checkpointer(root, job.state, piece_bytes=1 << 20)
    expected = image(job.state)
    handle = ckpt.save(1)
    ckpt._fences.remove()
    change()
    handle.join(60)
    ckpt.close()
    if handle.error is not None:
        assert isinstance(handle.error, TornSnapshotError)
        assert ckpt.steps() == []
        return True
    with Checkpointer(root, job.state) as reader:
        assert reader.load() == 1
    assert differences(expected, image(job.state)) == []
    return False


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_without_fence_is_refused_or_came_too_late_to_matter(kind: str, device: str) -> None:
    job = KINDS[kind](device)
    job.step()
    for _ in range(TRIES):
        saved_or_refused(job, job.step)


@pytest.mark.parametrize("device", DEVICES)
def test_an_average_that_moves_right_after_save_is_saved_as_it_was_or_refused(device: str) -> None:
    """A large copy that no optimizer owns has no fence (TRAPS 6)."""
    average = {"average": torch.randn(NUMEL, device=device)}
    for _ in range(TRIES):
        saved_or_refused(
            Job(average, lambda: None), lambda: average["average"].lerp_(torch.ones(1, device=device), 0.1)
        )


@pytest.mark.parametrize("device", DEVICES)
def test_small_tensors_without_an_optimizer_may_change_right_after_save(device: str) -> None:
    small = [torch.randn(100, 100, device=device) for _ in range(20)]

    def change() -> None:
        for tensor in small:
            tensor.zero_()

    assert not saved_or_refused(Job({"small": small}, lambda: None), change)


def test_a_frozen_base_is_not_copied_inside_save() -> None:
    """What has stayed the same is captured behind the call, like what an optimizer owns (TRAPS 6): a change of its last
    element right after `save()` is seen. One copy thread, so that it cannot be faster than the next line.
    """
    base, step = torch.zeros(8 * NUMEL), 0
    with Checkpointer(MemoryStorage(), {"base": base}, copy_threads=1) as ckpt:
        for _ in range(TRIES):
            for _ in range(5):
                step += 1
                ckpt.save(step).wait()
            step += 1
            handle = ckpt.save(step)
            base.data[-1] += 1
            handle.join(60)
            if handle.error is not None:
                break
    assert isinstance(handle.error, TornSnapshotError)


@pytest.mark.parametrize("device", DEVICES)
def test_the_debug_mode_refuses_a_change_that_no_sample_shows(device: str) -> None:
    weight = nn.Parameter(torch.zeros(8 * NUMEL, device=device))
    state = {"weight": weight, "optimizer": torch.optim.SGD([weight], lr=0.1)}
    with Checkpointer(MemoryStorage(), state, copy_threads=1, check_capture=True) as ckpt:
        for step in range(1, 1 + TRIES):
            handle = ckpt.save(step)
            weight.data[-300] += 1  # samples take the first and last elements of a piece, and inner ones far apart
            handle.join(60)
            if handle.error is not None:
                break
    assert isinstance(handle.error, TornSnapshotError)


def test_an_average_that_moves_now_and_then_costs_one_save_at_most() -> None:
    average, images, refused = torch.zeros(NUMEL), dict[int, torch.Tensor](), 0
    root = MemoryStorage()
    with Checkpointer(root, {"average": average}, piece_bytes=1 << 20) as ckpt:
        for step in range(1, 25):
            images[step] = average.clone()
            handle = ckpt.save(step)
            if step % 6 == 0:
                average.add_(1)
            handle.join(60)
            if handle.error is not None:
                assert isinstance(handle.error, TornSnapshotError)
                del images[step]
                refused += 1
    assert refused <= 1
    with Checkpointer(root, {"average": average}) as reader:
        for step, expected in images.items():
            reader.load(step)
            assert torch.equal(average, expected)
