"""The limits of the machine, and two prototypes that reach them with none of a checkpoint's promises.

A: all tensors go to page-locked memory on a side stream, and the optimizer's step waits for that on the device.
B: the same, but what cannot leave in time is copied on the device first, and leaves after the step.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import cuda

from benchmarks.stall_job import Training, synchronize

ALIGNMENT = 4096
COPIES = 8
# A part of what the window would take, so that jitter does not reach the fence.
FILL = 0.9


class PageLocked:
    """Host memory, touched by all cores and registered with the driver: eight times as fast as torch's allocator."""

    def __init__(self, nbytes: int) -> None:
        began = time.perf_counter()
        self.bytes = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8)
        skip = -self.bytes.data_ptr() % ALIGNMENT
        self.bytes = self.bytes[skip : skip + nbytes]
        before = torch.get_num_threads()
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.bytes.zero_()
        torch.set_num_threads(before)
        self._registered = cuda.is_available()
        if self._registered:
            _check(cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), nbytes, 0), "cudaHostRegister")
        self.seconds = time.perf_counter() - began

    def like(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Tensors of the same dtypes and shapes in it, one after the other."""
        views, offset = [], 0
        for tensor in tensors:
            views.append(self.bytes[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
            offset += _padded(tensor.nbytes)
        return views

    def close(self) -> None:
        if self._registered:
            _check(cuda.cudart().cudaHostUnregister(self.bytes.data_ptr()), "cudaHostUnregister")
            self._registered = False


class SideStream:
    """Prototype A, and with `spill_bytes` prototype B. A Method of benchmarks.stall_cost that persists nothing."""

    def __init__(self, job: Training, spill_bytes: int = 0) -> None:
        self._job = job
        tensors = [tensor for _, tensor in job.tensors()]
        self._host = PageLocked(sum(_padded(tensor.nbytes) for tensor in tensors))
        pairs = list(zip(tensors, self._host.like(tensors), strict=True))
        self._spilled: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        while pairs and spill_bytes > 0:
            source, target = pairs.pop()
            self._spilled.append((source, torch.empty_like(source), target))
            spill_bytes -= source.nbytes
        self._direct = pairs
        self._copies, self._spills = cuda.Stream(job.device), cuda.Stream(job.device)
        self._fences: list[cuda.Event] = []
        self._began, self._ended = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        self._hook = job.optimizer.register_step_pre_hook(self._fence)

    @property
    def host_tensors(self) -> list[torch.Tensor]:
        """Where the tensors of `job.tensors()` go, in that order."""
        return [target for _, target in self._direct] + [target for *_, target in reversed(self._spilled)]

    def save(self, step: int) -> None:
        self._began.record()
        now = cuda.current_stream()
        with cuda.stream(self._spills):
            self._spills.wait_stream(now)
            for source, spare, _ in self._spilled:
                spare.copy_(source, non_blocking=True)
            spilled = self._spills.record_event()
        with cuda.stream(self._copies):
            self._copies.wait_stream(now)
            for source, target in self._direct:
                target.copy_(source, non_blocking=True)
            self._fences = [spilled, self._copies.record_event()]
            self._copies.wait_event(spilled)
            for _, spare, target in self._spilled:
                target.copy_(spare, non_blocking=True)
            self._ended.record()

    def _fence(self, *_: Any) -> None:
        for event in self._fences:
            cuda.current_stream().wait_event(event)
        self._fences = []

    def guard(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def busy(self) -> bool:
        return not self._ended.query()

    def wait(self) -> float:
        self._ended.synchronize()
        return float(self._began.elapsed_time(self._ended)) / 1e3

    def remove(self, step: int) -> None: ...

    def close(self) -> None:
        self._ended.synchronize()
        self._hook.remove()
        self._host.close()


def spill_bytes(nbytes: int, rate: float, window_s: float) -> int:
    """What does not leave within the window, at `rate` bytes a second."""
    return max(0, nbytes - int(FILL * rate * window_s))


def copy_rate(device: torch.device, copy_bytes: int) -> float:
    """Bytes a second from the device into page-locked memory, in large copies: the best of several."""
    source = torch.ones(copy_bytes, dtype=torch.uint8, device=device)
    host = PageLocked(copy_bytes)
    seconds = []
    for _ in range(COPIES):
        synchronize(device)
        began = time.perf_counter()
        host.bytes.copy_(source, non_blocking=True)
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    host.close()
    return copy_bytes / min(seconds)


def device_copy_rate(device: torch.device, copy_bytes: int) -> float:
    """Bytes a second of one large copy on the device, counted once."""
    source = torch.ones(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(COPIES):
        synchronize(device)
        began = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return copy_bytes / statistics.median(seconds)


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _check(status: Any, call: str) -> None:
    if int(status) != 0:
        raise RuntimeError(f"{call} failed with CUDA error {int(status)}")
