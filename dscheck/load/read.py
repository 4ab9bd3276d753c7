"""Byte ranges become tensors: read, verify block by block, then place. No byte reaches a tensor unverified (C5)."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

import numpy as np
import torch
from numpy.typing import NDArray

from dscheck.commit.contents import Contents
from dscheck.commit.stored import ADVICE
from dscheck.errors import CorruptCheckpointError, DeadlineError
from dscheck.layout.region import Region
from dscheck.load.needs import Need, Read
from dscheck.native import crc32c_blocks
from dscheck.snapshot.bits import bits
from dscheck.state.placements import Part
from dscheck.state.tensors import torch_dtype

Checksums = Mapping[int, NDArray[np.uint32]]


class Reader:
    """Reads of one step into live tensors, several at once. A first error stops the rest."""

    def __init__(self, contents: Contents, checksums: Checksums, deadline: float) -> None:
        self._contents, self._checksums, self._deadline = contents, checksums, deadline
        self._block_bytes = contents.plan.block_bytes
        self._failed = threading.Event()

    def run(self, reads: Sequence[Read], threads: int) -> None:
        """All of `reads`. Raises the first error, or DeadlineError on time.monotonic(); a read that hangs is left
        behind.
        """
        pool = ThreadPoolExecutor(threads, thread_name_prefix="dscheck-read")
        futures = [pool.submit(self._one, read) for read in reads]
        done, pending = wait(futures, max(0.0, self._deadline - time.monotonic()), FIRST_EXCEPTION)
        late = bool(pending) and all(future.exception() is None for future in done)
        if late:
            self._failed.set()
        pool.shutdown(wait=not late, cancel_futures=True)
        for future in done:
            future.result()
        if late:
            raise DeadlineError(
                f"step {self._contents.record.step}: {len(pending)} of {len(reads)} reads from "
                f"{self._contents.storage.url} did not end in time",
                phase="read",
                waited_for=self._contents.storage.url,
            )

    def _one(self, read: Read) -> None:
        if self._failed.is_set():
            return
        try:
            buffer = torch.empty(read.stop - read.start, dtype=torch.uint8)
            data = memoryview(buffer.numpy().data)
            key = self._contents.key(read.rank)
            self._contents.storage.read_into(key, read.start, data)
            for need in read.needs:
                self._verify(need, data, read, key)
            for need in read.needs:
                _deliver(need, buffer, need.fragment.offset - read.start)
        except BaseException:
            self._failed.set()
            raise

    def _verify(self, need: Need, data: memoryview, read: Read, key: str) -> None:
        block = self._block_bytes
        start, stop = need.extent(block)
        found = crc32c_blocks(data[start - read.start : stop - read.start], block)
        first = need.fragment.first_block + need.first
        stored = self._checksums[read.rank][first : first + len(found)]
        if not np.array_equal(found, stored):
            bad = int(np.flatnonzero(found != stored)[0])
            raise CorruptCheckpointError(
                f"fragment '{need.row.name}' {need.fragment.region} of step {self._contents.record.step}: crc32c "
                f"{stored[bad]:#010x} "
                f"stored, {found[bad]:#010x} read from '{self._contents.storage.url}/{key}' at "
                f"{start + bad * block}; {ADVICE}",
                key=key,
                tensor=need.row.name,
                offset=start + bad * block,
            )


def _deliver(need: Need, buffer: torch.Tensor, fragment_at: int) -> None:
    """Copy one verified box to its tensor. `fragment_at` is where the fragment would begin in `buffer`, maybe before
    it.
    """
    part: Part = need.target
    dtype = torch_dtype(need.row.dtype)
    view = part.view[need.box.relative_to(part.region.start).slices()] if part.view.ndim else part.view
    converted = view.dtype is not dtype
    stored = _box(buffer, fragment_at, need.fragment.region, need.box, dtype)
    with torch.no_grad():
        if converted:
            view.detach().copy_(stored)
        else:
            bits(view).copy_(bits(stored))


def _box(buffer: torch.Tensor, base: int, outer: Region, box: Region, dtype: torch.dtype) -> torch.Tensor:
    """The elements of `box` as they lie in `buffer`, where the row-major bytes of `outer` would begin at byte
    `base`.
    """
    strides, step = [], 1
    for length in reversed(outer.shape):
        strides.append(step)
        step *= length
    strides.reverse()
    inner = box.relative_to(outer.start)
    first = base + dtype.itemsize * sum(a * s for a, s in zip(inner.start, strides, strict=True))
    span = 1 + sum((n - 1) * s for n, s in zip(box.shape, strides, strict=True))
    elements = buffer[first : first + span * dtype.itemsize].view(dtype)
    return elements.as_strided(box.shape, strides)
