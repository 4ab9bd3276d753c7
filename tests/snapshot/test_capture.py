"""Invariant C11: the snapshot is the state of the moment `save()` was called, or it is refused."""

from __future__ import annotations

import gc
import os
import resource
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dscheck.config import Settings
from dscheck.errors import ConfigError, DeadlineError, DscheckError, TornSnapshotError
from dscheck.snapshot import Capture, CapturePlan, Capturer, Fences, Source, bits
from dscheck.snapshot.plan import Calm

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
SMALL_PIECES = {"piece_bytes": 1 << 18, "block_bytes": 1 << 16}


class Training:
    """One parameter, one optimizer that has stepped once, what nobody fences, and captures of all of it."""

    def __init__(self, kind: str = "fused", numel: int = 300_000, device: str = "cpu", **settings: Any) -> None:
        self.weight = torch.nn.Parameter(torch.randn(numel, device=device))
        self.optimizer = OPTIMIZERS[kind]([self.weight])
        self.fences = Fences()
        self.fences.watch([self.optimizer])
        self.extra: list[torch.Tensor] = []
        self.capturer = Capturer(Settings(**{**SMALL_PIECES, **settings}), self.fences.steps)
        self.plan: CapturePlan | None = None
        self.step()

    def step(self) -> None:
        self.weight.grad = torch.randn_like(self.weight)
        self.optimizer.step()

    def owned(self) -> list[torch.Tensor]:
        return [self.weight, *self.optimizer.state[self.weight].values()]

    def locals(self) -> list[torch.Tensor]:
        return [*self.owned(), *self.extra]

    def begin(self, deadline_s: float = 10.0) -> Capture:
        """A capture that is guarded, but where nobody waited for what is not fenced."""
        owners = [self.optimizer] * len(self.owned()) + [None] * len(self.extra)
        sources = [Source(f"t{i}", i, t, o) for i, (t, o) in enumerate(zip(self.locals(), owners, strict=True))]
        self.plan = self.plan or self.capturer.plan(self.locals(), sources, [(0, self.weight.detach())])
        capture = self.capturer.take(self.plan, self.locals(), time.monotonic() + deadline_s)
        self.fences.guard(capture)
        return capture

    def capture(self, deadline_s: float = 10.0) -> Capture:
        capture = self.begin(deadline_s)
        capture.hold()
        return capture

    def end(self, capture: Capture) -> None:
        self.fences.release(capture)
        assert capture.release()


def bytes_of(tensor: torch.Tensor) -> bytes:
    plain = bits(tensor.detach().clone(memory_format=torch.contiguous_format)).cpu()
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def all_bytes(tensors: Sequence[torch.Tensor]) -> list[bytes]:
    return [bytes_of(tensor) for tensor in tensors]


def consume(capture: Capture, count: int) -> list[bytes]:
    return [b"".join(chunk.data.tobytes() for chunk in capture.chunks(index)) for index in range(count)]


def consumed_beside(capture: Capture, count: int, meanwhile: Callable[[], None]) -> list[bytes]:
    """What a consumer in another thread gets while `meanwhile` runs in this one."""
    found: list[bytes] = []
    thread = threading.Thread(target=lambda: found.extend(consume(capture, count)))
    thread.start()
    capture.hold()
    meanwhile()
    thread.join()
    return found


def stuck(training: Training) -> Capture:
    """A capture none of whose pieces has a place: an earlier one has filled the region, and nobody takes it out."""
    first = training.capture()
    first.wait()
    assert not training.capturer.room(training.plan)  # type: ignore[arg-type]
    return training.begin(deadline_s=1.0)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_after_save_waits_for_the_capture_of_what_it_changes(kind: str) -> None:
    training = Training(kind)
    expected = all_bytes(training.locals())
    capture = training.capture()
    training.step()
    capture.wait()
    assert consume(capture, len(expected)) == expected
    training.end(capture)
    assert capture.fence_s + capture.host_memory_s > 0


@pytest.mark.parametrize("budget", ["auto", 1 << 19, 1 << 17])
def test_captures_one_after_the_other_are_each_of_their_moment(budget: Any) -> None:
    """TRAPS 18: an EMA copy that changes right after `save()`; with less memory than the state it passes through."""
    training = Training(host_memory_bytes=budget)
    training.extra = [torch.randn(70_000), torch.randn(300, 400).t(), torch.randn(500, 300)[:, 7:250], torch.empty(0)]

    def change() -> None:
        training.step()
        for tensor in training.extra:
            tensor.mul_(1.5)

    for _ in range(5):
        expected = all_bytes(training.locals())
        capture = training.begin()
        assert consumed_beside(capture, len(expected), change) == expected
        capture.wait()
        training.end(capture)


def test_several_captures_are_under_way_within_the_budget() -> None:
    training = Training(host_memory_bytes=3 * 4 * 300_000 * 3 + (1 << 20))
    expected, captures = [], []
    for _ in range(3):
        assert not captures or training.capturer.room(training.plan)  # type: ignore[arg-type]
        expected.append(all_bytes(training.locals()))
        captures.append(training.capture())
        training.step()
    assert not training.capturer.room(training.plan)  # type: ignore[arg-type]
    assert [consume(capture, 4) for capture in captures] == expected


def test_what_never_changes_is_captured_lazily_from_the_third_time_on() -> None:
    """TRAPS 6: a frozen base of tens of gigabytes must not be copied inside the call."""
    training = Training()
    training.extra = [torch.randn(70_000)]
    volatile = []
    for _ in range(4):
        capture = training.capture()
        volatile.append(bool(capture._volatile))
        capture.wait()
        training.end(capture)
    assert volatile == [True, True, False, False]
    first = training.capture()
    first.wait()
    capture = training.begin()  # has no place before the first one is consumed
    training.extra[0].data.mul_(2)  # moves no version counter
    consume(first, 5)
    with pytest.raises(TornSnapshotError, match="t4"):
        capture.wait()
    training.end(first)
    training.end(capture)
    assert training.capture()._volatile  # and is taken for what it is from then on


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_that_no_fence_held_back_is_refused(kind: str) -> None:
    training = Training(kind)
    capture = stuck(training)
    training.fences.release(capture)
    training.step()
    with pytest.raises(TornSnapshotError, match="stepped before it was captured"):
        capture._refuse_changed(None)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_behind_removed_hooks_is_refused_by_samples_or_versions(kind: str) -> None:
    """The step count does not move, nor does fused AdamW move version counters (TRAPS 17)."""
    training = Training(kind)
    first = training.capture()
    first.wait()
    capture = training.begin()  # has no place before the first one is consumed
    training.fences.remove()
    training.step()
    consume(first, len(training.locals()))
    with pytest.raises(TornSnapshotError, match=r"its values changed|was written to"):
        capture.wait()


def mul_data(p: torch.Tensor) -> None:
    p.data.mul_(1.01)


def change_one_row_in_the_middle(p: torch.Tensor) -> None:
    """TRAPS 19: few elements of one piece change, as in a sparse step."""
    p.data[100_000:100_400].add_(1)


@pytest.mark.parametrize("change", [mul_data, lambda p: p.detach().add_(1), change_one_row_in_the_middle])
def test_a_tensor_changed_past_the_fence_fails_the_save(change: Any) -> None:
    """`p.data.mul_` moves no version counter (TRAPS 17)."""
    training = Training(piece_bytes=1 << 16)
    first = training.capture()
    first.wait()
    capture = training.begin()
    change(training.weight)
    consume(first, 4)
    with pytest.raises(TornSnapshotError, match="t0"):
        capture.wait()


def test_a_change_that_samples_miss_is_found_by_the_debug_mode() -> None:
    training = Training(check_capture=True)
    first = training.capture()
    first.wait()
    capture = training.begin()
    training.weight.data[20_001] += 1
    consume(first, 4)
    with pytest.raises(TornSnapshotError, match="hash"):
        consume(capture, 4)
    with pytest.raises(TornSnapshotError, match="hash"):
        capture.wait()


def test_after_the_explicit_fence_everything_may_change() -> None:
    training = Training()
    training.extra = [torch.randn(70_000)]
    expected = all_bytes(training.locals())
    capture = training.capture()
    training.fences.fence()
    for tensor in training.locals():
        tensor.detach().zero_()
    capture.wait()
    assert consume(capture, len(expected)) == expected


def test_a_replaced_parameter_is_captured_as_it_was() -> None:
    """After `p.data = x` a held `p` would show the new values (TRAPS 22)."""
    training = Training()
    expected = bytes_of(training.weight)
    first = training.capture()
    first.wait()
    capture = training.begin()
    training.weight.data = torch.zeros(7)
    consume(first, 4)
    capture.wait()
    assert consume(capture, 1) == [expected]


def test_a_capture_lets_go_of_the_live_memory_when_it_is_whole() -> None:
    training = Training()
    capture = training.capture()
    capture.wait()
    held = weakref.ref(training.optimizer.state[training.weight]["exp_avg"])
    del training.optimizer.state[training.weight]["exp_avg"]
    gc.collect()
    assert held() is None


def test_loading_an_optimizer_state_dict_waits_for_the_capture() -> None:
    training = Training()
    state = training.optimizer.state_dict()
    index = next(
        i for i, t in enumerate(training.locals()) if t is training.optimizer.state[training.weight]["exp_avg"]
    )
    expected = all_bytes(training.locals())
    capture = training.capture()
    training.optimizer.load_state_dict(state)
    training.optimizer.state[training.weight]["exp_avg"].zero_()
    capture.wait()
    assert consume(capture, len(expected))[index] == expected[index]


def test_a_module_that_loads_a_state_dict_waits_for_the_capture() -> None:
    module = torch.nn.Linear(300, 300)
    fences = Fences()
    fences.watch([torch.optim.SGD(module.parameters(), lr=0.1)], [module])
    capturer = Capturer(Settings(), fences.steps)
    plan = capturer.plan([module.weight], [Source("weight", 0, module.weight, None)])
    expected = bytes_of(module.weight)
    capture = capturer.take(plan, [module.weight], time.monotonic() + 10)
    fences.guard(capture)
    module.load_state_dict({"weight": torch.zeros(300, 300), "bias": torch.zeros(300)})
    assert consume(capture, 1) == [expected]


def test_a_failing_hook_fails_the_capture_and_not_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant C8: a hook that raises would kill the step (TRAPS 15)."""
    training = Training()
    capture = training.capture()
    before = training.weight.detach().clone()

    def broken(self: Capture, number: int) -> None:
        raise ValueError("injected")

    monkeypatch.setattr(Capture, "_hold_back", broken)
    training.step()
    assert not torch.equal(before, training.weight)
    with pytest.raises(TornSnapshotError, match="injected"):
        capture.wait()


def test_a_fence_gives_up_at_its_deadline_and_names_what_it_waited_for() -> None:
    """Invariant C7: a region that nobody empties holds the step back only so long."""
    training = Training()
    capture = stuck(training)
    began = time.monotonic()
    training.step()
    assert 0.5 < time.monotonic() - began < 5
    assert capture.host_memory_s > 0.5
    with pytest.raises(DeadlineError, match="t0"):
        capture.wait()


def test_a_failed_capture_gives_its_room_to_the_next_one() -> None:
    training = Training()
    for _ in range(3):
        capture = training.capture()
        capture.fail(DscheckError("given up"))
        with pytest.raises(DscheckError, match="given up"):
            capture.wait()
        training.end(capture)
    expected = all_bytes(training.locals())
    assert consume(training.capture(), 4) == expected


def test_a_capturer_reserves_no_more_addresses_than_the_machine_has_memory() -> None:
    """Dozens of them may be there, and the addresses of a process end, at 128 TiB."""

    def reserved() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

    before = reserved()
    capturer = Capturer(Settings(), lambda owner: 0)
    memory = os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()
    assert reserved() - before <= 2 * memory + (1 << 30)
    capturer.close()


def test_memory_that_was_refused_once_is_asked_for_again() -> None:
    training, limit = Training(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        capture = training.capture()
        with pytest.raises(DscheckError, match="host memory"):
            capture.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    training.end(capture)
    expected = all_bytes(training.locals())
    assert consume(training.capture(), 4) == expected


def test_a_tensor_made_in_inference_mode_may_take_the_place_of_another() -> None:
    """It has no version counter, and the structure of the state is the same."""
    weight = torch.randn(100_000)
    capturer = Capturer(Settings(), lambda owner: 0)
    plan = capturer.plan([weight], [Source("weight", 0, weight)])
    with torch.inference_mode():
        other = torch.randn(100_000)
    for tensor in (weight, other, weight, other):
        capture = capturer.take(plan, [tensor], time.monotonic() + 30)
        capture.hold()
        capture.wait()
        assert b"".join(bytes(chunk.data) for chunk in capture.chunks(0)) == tensor.numpy().tobytes()
        capture.release()
    capturer.close()


def test_the_region_is_exact_and_reused() -> None:
    """Invariant C12: of the host's memory a capture takes what this rank writes, once, and some for small tensors."""
    training = Training()
    for _ in range(3):
        capture = training.capture()
        consume(capture, 4)
        training.end(capture)
    used = training.capturer._copier.usable
    assert 3 * 4 * 300_000 <= used <= 3 * 4 * 300_000 + 8192


def test_a_budget_that_can_never_work_is_refused_with_the_number_that_would() -> None:
    with pytest.raises(ConfigError, match="131072"):
        Training(host_memory_bytes=1 << 16).capture()


def test_samples_tell_the_same_for_equal_bytes_on_every_rank() -> None:
    training = Training()
    capture = training.capture()
    sample = capture.sample(0)
    assert len(sample) == 256
    assert sample[:64] == bytes_of(training.weight)[:64]
    assert sample[-64:] == bytes_of(training.weight)[-64:]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_dtype_and_stride_is_captured_bit_for_bit(dtype: torch.dtype) -> None:
    numel = 48 * 1024 // dtype.itemsize
    base = torch.randint(0, 255, (numel * dtype.itemsize,), dtype=torch.uint8).view(dtype).view(8, -1)
    tensors = [base, base.t(), base[::2, 1:3], base[0, 0], base[1:, 5:], base.view(4, 2, -1).permute(2, 0, 1)]
    capturer = Capturer(Settings(**SMALL_PIECES), lambda owner: 0)
    plan = capturer.plan(tensors, [Source(str(i), i, tensor) for i, tensor in enumerate(tensors)])
    expected = [bits(tensor).contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors]
    capture = capturer.take(plan, tensors, time.monotonic() + 10)
    capture.hold()
    assert consume(capture, len(tensors)) == expected
    for view in tensors:
        assert bits(view).data_ptr() == view.data_ptr()


def test_what_still_reads_a_capture_that_was_given_up_does_no_harm() -> None:
    """A thread that hung may wake when its save is long over: it must neither crash nor give back others' memory."""
    training = Training()
    first = training.capture()
    first.wait()
    late = first.chunks(0)
    next(late)
    training.end(first)
    second = training.capture()
    second.wait()
    for index in range(4):
        for _ in late if index == 0 else first.chunks(index):
            pass
    first.sample(0)
    assert not training.capturer.room(training.plan)  # type: ignore[arg-type]
    assert consume(second, 4) == all_bytes(training.locals())


def test_a_capturer_may_go_while_its_memory_is_prepared() -> None:
    for _ in range(10):
        training = Training(numel=1_000_000)
        training.fences.release(training.begin())
        training.capturer.close()


def test_a_fence_that_copies_lets_other_threads_run() -> None:
    training = Training(numel=20_000_000, copy_threads=1)
    warm = training.capture()
    warm.wait()
    training.end(warm)
    seen, done = [time.monotonic()], threading.Event()

    def tick() -> None:
        while not done.is_set():
            seen.append(time.monotonic())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    capture = training.capture()
    began = time.monotonic()
    capture.fence()
    ended = time.monotonic()
    done.set()
    thread.join()
    assert ended - began < 0.01 or sum(began < at < ended for at in seen) >= 3


def test_captures_are_guarded_and_released_by_two_threads() -> None:
    """Training takes the next capture while the thread of the saves lets go of the last one."""
    fences = Fences()
    passing: list[Any] = [object() for _ in range(100)]
    staying: list[Any] = [object() for _ in range(300)]
    for one in passing:
        fences.guard(one)

    def release() -> None:
        for one in passing * 50:
            fences.release(one)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        thread = threading.Thread(target=release)
        thread.start()
        for one in staying:
            fences.guard(one)
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert fences._captures == tuple(staying)


def test_a_capture_whose_driver_fails_is_not_settled() -> None:
    """What may still be written to must not be handed out again."""

    class Failing:
        def release(self, native: Any, deadline_s: float) -> bool:
            raise RuntimeError("cuEventRecord: an illegal memory access was encountered (700)")

    training = Training()
    capture = training.capture()
    copier, capture._copier = capture._copier, Failing()  # type: ignore[assignment]
    assert not capture.release()
    capture._copier = copier
    training.end(capture)


def test_a_tensor_is_taken_for_frozen_whole_or_not_at_all() -> None:
    """TRAPS 19: few changed rows show in the samples of few pieces, and version counters may not move."""
    calm = Calm(np.array([5, 5, 7]), np.array([5, 7]))
    calm.note([0, 0], [b"a", b"b", b"c"])
    calm.note([0, 0], [b"a", b"B", b"c"])
    assert calm([0, 0]).tolist() == [False, False, True]


def test_memory_that_was_freed_under_a_capture_refuses_it() -> None:
    """Holding a storage does not keep its bytes: resize_(0) gives them back all the same."""
    training = Training()
    capture = training.capture()
    capture._copier.wait(capture._native, time.monotonic() + 10)  # nothing reads it any more
    training.weight.untyped_storage().resize_(0)
    with pytest.raises(TornSnapshotError, match="freed"):
        capture.wait()


def test_what_nobody_fences_may_be_freed_once_it_is_held_back_for() -> None:
    training = Training()
    training.extra = [torch.randn(70_000)]
    expected = all_bytes(training.locals())
    capture = training.capture()
    training.extra[0].untyped_storage().resize_(0)
    capture.wait()
    assert consume(capture, len(expected)) == expected


def test_a_plan_keeps_no_optimizer_alive() -> None:
    training = Training()
    capture = training.capture()
    capture.wait()
    training.end(capture)
    optimizer, plan = weakref.ref(training.optimizer), training.plan
    del training, capture
    gc.collect()
    assert optimizer() is None
    assert plan is not None
