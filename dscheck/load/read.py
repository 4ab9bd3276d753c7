"""Byte ranges become tensors: read, verify block by block, then place. No byte reaches a tensor unverified (C5)."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from dscheck.commit.contents import Contents
from dscheck.commit.stored import ADVICE
from dscheck.config import Settings
from dscheck.errors import CorruptCheckpointError, DeadlineError, DscheckError, StorageError
from dscheck.load.needs import Need, Read
from dscheck.load.place import Copy, Deliveries, copy_of, is_plain
from dscheck.native import File, NativeReader, place
from dscheck.storage.base import LocalFiles, Requests, Storage

Checksums = Mapping[int, NDArray[np.uint32]]
Blocks = tuple[int, int, NDArray[np.uint32]]
"""Whole blocks side by side: their offset in the bytes read, their bytes, and the CRC32C of each."""

AT_ONCE = 5
"""Reads that always find a buffer, whatever the budget."""

BUFFER_EXTRA_BYTES = 2 << 20
"""What a buffer has beside the longest read, to align it."""

AHEAD = 64
"""Reads that native threads know of beforehand; each may hold two descriptors of its file."""

PATIENCE_S, PATIENCE_FOR_DEVICES_S = 0.2, 0.001
"""How long to look away from signals, and from copies to a device."""


@dataclass(frozen=True, slots=True)
class Task:
    """One read, and whether its bytes are wanted once they are verified, besides by what it serves here."""

    read: Read
    kept: bool = False


class Reader:
    """The reads of one load into live tensors, several at once, in this order. A first error stops the rest.

    `with` it: when it is left, nothing is being placed any more. A read that hangs is left behind with its memory.
    """

    def __init__(
        self,
        storage: Storage,
        contents: Contents,
        checksums: Checksums,
        tasks: Sequence[Task],
        settings: Settings,
        deadline: float,
    ) -> None:
        self._storage = storage
        self._contents, self._checksums, self._tasks, self._deadline = contents, checksums, tasks, deadline
        self._block_bytes = contents.plan.block_bytes
        self._deliveries = Deliveries()
        self._uses: Counter[int] = Counter()
        self._added = self._finished = 0
        self._file: tuple[int, File] | None = None
        self._error: BaseException | None = None
        longest = max((task.read.stop - task.read.start for task in tasks), default=0)
        most = max(AT_ONCE, settings.read_memory_bytes // (longest + BUFFER_EXTRA_BYTES))
        threads = min(_threads(storage, settings), most, len(tasks))
        waits = any(task.kept or _delivered(task.read) for task in tasks)
        buffers = min(most, len(tasks)) if waits else threads  # each costs its first touch
        device = _page_locked_for(need for task in tasks for need in task.read.needs)
        local = isinstance(storage, LocalFiles)
        self._native = NativeReader(threads if local else 0, buffers, longest, self._block_bytes, device)
        for number in range(0 if local else threads):
            threading.Thread(target=self._fill, name=f"dscheck-read-{number}", daemon=True).start()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self._native.stop()
        self._deliveries.finish()

    def finished(self) -> Iterator[int]:
        """The kept tasks, by number, as they are verified and placed, until all tasks are. Raises the first error, or
        DeadlineError on time.monotonic().
        """
        while self._finished < len(self._tasks) or self._deliveries:
            self._add()
            number = self._next()
            if number is None:
                continue
            self._finished += 1
            task = self._tasks[number]
            needs = _delivered(task.read)
            if needs:
                self._deliveries.start(self.bytes(number), needs, partial(self.release, number))
            self._uses[number] = bool(needs) + task.kept
            if task.kept:
                yield number

    def bytes(self, number: int) -> torch.Tensor:
        """The verified bytes of a kept task, on the host, until `release`."""
        return torch.from_numpy(self._native.buffer(number))

    def release(self, number: int) -> None:
        """Give back the memory of a kept task."""
        self._uses[number] -= 1
        if not self._uses[number]:
            self._native.release(number)

    def place(self, read: Read, data: torch.Tensor) -> None:
        """The bytes of `read`, which another rank has verified, are placed, and verified again where they lie on the
        host. Raises CorruptCheckpointError.
        """
        needs = _delivered(read)
        if data.is_cpu or len(needs) < len(read.needs):
            blocks, copies = self._native_form(read)
            damage = place(data.cpu().numpy(), self._block_bytes, blocks, copies)
            if damage is not None:
                offset, stored, found = damage
                raise self._corrupt(read, read.start + offset, stored, found)
        if needs:
            self._deliveries.start(data, needs)
            self._deliveries.tidy()

    def _add(self) -> None:
        while self._added < len(self._tasks) and self._added - self._finished < AHEAD:
            task = self._tasks[self._added]
            read = task.read
            blocks, copies = self._native_form(read)
            kept = task.kept or len(copies) < len(read.needs)
            self._native.add(self._open(read.rank), read.start, read.stop - read.start, blocks, copies, kept)
            self._added += 1

    def _native_form(self, read: Read) -> tuple[list[Blocks], list[Copy]]:
        copies = [copy_of(need, need.fragment.offset - read.start) for need in read.needs if is_plain(need)]
        return self._blocks(read), copies

    def _blocks(self, read: Read) -> list[Blocks]:
        """What is to be verified, each block once."""
        crcs, found, end = self._checksums[read.rank], [], -1
        for need in sorted(read.needs, key=lambda need: need.fragment.first_block + need.first):
            first = max(need.first, end - need.fragment.first_block)
            if first < need.last:
                start, stop = need.fragment.offset + first * self._block_bytes, need.extent(self._block_bytes)[1]
                numbers = slice(need.fragment.first_block + first, need.fragment.first_block + need.last)
                found.append((start - read.start, stop - start, crcs[numbers]))
                end = numbers.stop
        return found

    def _open(self, rank: int) -> File | None:
        storage = self._storage
        if not isinstance(storage, LocalFiles):
            return None
        if self._file is None or self._file[0] != rank:
            key = self._contents.key(rank)
            with storage.open_local(key) as (fd, _):
                try:
                    self._file = rank, File(fd)
                except RuntimeError as error:
                    raise StorageError(
                        f"cannot read '{storage.url}/{key}': {error}", url=storage.url, key=key
                    ) from None
        return self._file[1]

    def _next(self) -> int | None:
        """The next read that is finished, if one is soon."""
        self._deliveries.tidy()
        now = time.monotonic()
        patience_s = PATIENCE_FOR_DEVICES_S if self._deliveries else PATIENCE_S
        number = self._native.finished(min(self._deadline, now + patience_s))
        if number is None:
            self._raise_error()
            if now > self._deadline:
                raise self._late()
        return number

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error
        fault = self._native.fault()
        if fault is None:
            return
        number, offset, error, crcs = fault
        read = self._tasks[number].read
        storage, key = self._storage, self._contents.key(read.rank)
        if crcs is not None:
            raise self._corrupt(read, offset, *crcs)
        where = f"'{storage.url}/{key}'"
        if error:
            reason = os.strerror(error)
            raise StorageError(f"cannot read {where} at {offset}: {reason}", url=storage.url, key=key) from OSError(
                error, reason
            )
        raise CorruptCheckpointError(
            f"{where} ends at byte {offset}, and bytes [{read.start}, {read.stop}) were asked for; {ADVICE}",
            url=storage.url,
            key=key,
        )

    def _corrupt(self, read: Read, offset: int, stored: int, found: int) -> DscheckError:
        block, key = self._block_bytes, self._contents.key(read.rank)
        where = f"'{self._storage.url}/{key}' at {offset}"
        need = next(need for need in read.needs if need.extent(block)[0] <= offset < need.extent(block)[1])
        return CorruptCheckpointError(
            f"fragment '{need.row.name}' {need.fragment.region} of step {self._contents.record.step}: crc32c "
            f"{stored:#010x} stored, {found:#010x} read from {where}; {ADVICE}",
            key=key,
            tensor=need.row.name,
            offset=offset,
        )

    def _late(self) -> DscheckError:
        url = self._storage.url
        return DeadlineError(
            f"step {self._contents.record.step}: {len(self._tasks) - self._finished} of {len(self._tasks)} reads from "
            f"{url} did not end in time",
            phase="read",
            waited_for=url,
        )

    def _fill(self) -> None:
        """One thread that reads what native threads cannot."""
        storage = self._storage
        try:
            while (number := self._native.next_to_fill(self._deadline)) is not None:
                read = self._tasks[number].read
                storage.read_into(self._contents.key(read.rank), read.start, self._native.buffer(number).data)
                self._native.filled(number)
        except BaseException as error:
            self._error = self._error or error
            self._native.stop()


def _threads(storage: Storage, settings: Settings) -> int:
    """A read from afar mostly waits: there are as many at once as reach the storage's rate."""
    return max(settings.read_threads, storage.requests_in_flight if isinstance(storage, Requests) else 0)


def _delivered(read: Read) -> list[tuple[Need, int]]:
    """What torch has to write, with bases as in `copy_of`."""
    return [(need, need.fragment.offset - read.start) for need in read.needs if not is_plain(need)]


def _page_locked_for(needs: Iterator[Need]) -> int:
    """The CUDA device that buffers are page-locked for, or -1: a copy from other memory is slow, and waits."""
    devices = (need.target.view.device for need in needs)
    return next((device.index or 0 for device in devices if device.type == "cuda"), -1)
