"""Invariant C11: the snapshot is the state of the moment `save()` was called, or it is refused."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from dscheck.errors import DeadlineError, TornSnapshotError
from dscheck.snapshot import Arena, Capture, Fences, Lanes, Source, bits, sample

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex32, torch.complex64, torch.complex128,
    torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32,
    torch.int64,
    torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
]  # fmt: skip

OPTIMIZERS = {
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "plain": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False, fused=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}


class Training:
    """One parameter, one optimizer that has stepped once, and the capture of both."""

    def __init__(self, kind: str = "fused", numel: int = 300_000) -> None:
        self.weight = torch.nn.Parameter(torch.randn(numel))
        self.optimizer = OPTIMIZERS[kind]([self.weight])
        self.fences = Fences()
        self.fences.watch([self.optimizer])
        self.arena = Arena()
        self.step()

    def step(self) -> None:
        self.weight.grad = torch.randn_like(self.weight)
        self.optimizer.step()

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"weight": self.weight.detach(), **self.optimizer.state[self.weight]}

    def capture(self, deadline_s: float = 10.0, **extra: torch.Tensor) -> Capture:
        sources = [Source(name, view, self.optimizer) for name, view in self.tensors().items()]
        sources += [Source(name, view) for name, view in extra.items()]
        deadline = time.monotonic() + deadline_s
        capture = Capture(sources, self.arena, Lanes(), self.fences.steps, piece_bytes=1 << 18, deadline=deadline)
        self.fences.guard(capture)
        return capture


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_after_save_waits_for_the_capture_of_what_it_changes(kind: str) -> None:
    training = Training(kind)
    expected = [bytes_of(tensor) for tensor in training.tensors().values()]
    capture = training.capture()
    training.step()
    capture.run()
    assert [torch.equal(capture.data(i), want) for i, want in enumerate(expected)] == [True] * len(expected)
    assert capture.fence_s > 0


def test_a_tensor_without_owner_may_change_as_soon_as_the_capture_exists() -> None:
    training = Training()
    ema = torch.randn(1000)
    expected = bytes_of(ema)
    capture = training.capture(ema=ema)
    ema.zero_()
    capture.run()
    assert torch.equal(capture.data(len(training.tensors())), expected)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_that_no_fence_held_back_is_refused(kind: str) -> None:
    training = Training(kind)
    capture = training.capture()
    training.fences.guard(None)
    training.step()
    with pytest.raises(TornSnapshotError, match="stepped before it was captured"):
        capture.run()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_behind_removed_hooks_is_refused_by_samples_or_versions(kind: str) -> None:
    """The step count does not move, nor does fused AdamW move version counters (TRAPS 17)."""
    training = Training(kind)
    capture = training.capture()
    training.fences.remove()
    training.step()
    with pytest.raises(TornSnapshotError, match=r"its values changed|was written to"):
        capture.run()


def mul_data(p: torch.Tensor) -> None:
    p.data.mul_(1.01)


@pytest.mark.parametrize("change", [mul_data, lambda p: p.detach().add_(1)])
def test_a_tensor_changed_past_the_fence_fails_the_save(change: Any) -> None:
    """`p.data.mul_` moves no version counter (TRAPS 17)."""
    training = Training()
    capture = training.capture()
    change(training.weight)
    with pytest.raises(TornSnapshotError, match="weight"):
        capture.run()


def test_after_the_explicit_fence_everything_may_change() -> None:
    training = Training()
    expected = [bytes_of(tensor) for tensor in training.tensors().values()]
    capture = training.capture()
    training.fences.fence()
    for tensor in training.tensors().values():
        tensor.zero_()
    capture.run()
    assert all(torch.equal(capture.data(i), want) for i, want in enumerate(expected))


def test_a_replaced_parameter_is_captured_as_it_was() -> None:
    """After `p.data = x` a held `p` would show the new values (TRAPS 22)."""
    training = Training()
    expected = bytes_of(training.weight)
    capture = training.capture()
    training.weight.data = torch.zeros(7)
    capture.run()
    assert torch.equal(capture.data(0), expected)


def test_loading_an_optimizer_state_dict_waits_for_the_capture() -> None:
    training = Training()
    state = training.optimizer.state_dict()
    expected = bytes_of(training.optimizer.state[training.weight]["exp_avg"])
    capture = training.capture()
    training.optimizer.load_state_dict(state)
    training.optimizer.state[training.weight]["exp_avg"].zero_()
    capture.run()
    assert torch.equal(capture.data(list(training.tensors()).index("exp_avg")), expected)


def test_a_module_that_loads_a_state_dict_waits_for_the_capture() -> None:
    module = torch.nn.Linear(100, 100)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    fences = Fences()
    fences.watch([optimizer], [module])
    expected = bytes_of(module.weight)
    source = Source("weight", module.weight, optimizer)
    capture = Capture([source], Arena(), Lanes(), fences.steps, piece_bytes=1 << 18, deadline=time.monotonic() + 10)
    fences.guard(capture)
    module.load_state_dict({"weight": torch.zeros(100, 100), "bias": torch.zeros(100)})
    capture.run()
    assert torch.equal(capture.data(0), expected)


def test_a_failing_hook_fails_the_capture_and_not_the_training() -> None:
    """Invariant C8: a hook that raises would kill the step (TRAPS 15)."""
    training = Training()
    capture = training.capture()
    before = training.weight.detach().clone()
    capture._pieces[0].host = torch.empty(1)
    training.step()
    assert not torch.equal(before, training.weight)
    with pytest.raises(TornSnapshotError, match="capture failed"):
        capture.run()


def test_a_fence_gives_up_at_its_deadline() -> None:
    """Invariant C7: a piece that a stuck thread has taken holds the step back only so long."""
    training = Training()
    capture = training.capture(deadline_s=0.2)
    assert capture._take(capture._pieces[0])
    training.step()
    with pytest.raises(DeadlineError, match="weight"):
        capture.run()


def test_the_region_is_reused_and_grows_only_when_it_must() -> None:
    """Invariant C12, as far as it goes: of the host's memory a save takes what this rank writes, once."""
    training = Training()
    training.capture().run()
    size = training.arena.nbytes
    pointer = training.arena._memory.data_ptr()
    training.capture().run()
    assert (training.arena.nbytes, training.arena._memory.data_ptr()) == (size, pointer)
    assert size <= 3 * training.weight.numel() * 4 + 4 * 64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_any_dtype_and_stride_alias_their_memory(dtype: torch.dtype) -> None:
    base = torch.randint(0, 255, (6 * 4 * dtype.itemsize,), dtype=torch.uint8).view(dtype).view(6, 4)
    for view in (base, base.t(), base[::2, 1:3], base[0, 0]):
        plain = bits(view)
        assert plain.data_ptr() == view.data_ptr()
        assert plain.dtype.is_floating_point is plain.dtype.is_complex is False
        copy = torch.empty(plain.shape, dtype=plain.dtype)
        copy.copy_(plain)
        assert torch.equal(sample(copy), sample(plain))


def test_samples_take_the_first_last_and_inner_elements() -> None:
    values = torch.arange(10_000).view(100, 100)
    taken = sample(values.t()).tolist()
    flat = values.t().reshape(-1).tolist()
    assert taken[:16] == flat[:16]
    assert taken[-16:] == flat[-16:]
    assert len(set(taken)) == 64
