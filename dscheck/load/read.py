"""Byte ranges become tensors: read, verify block by block, then place. No byte reaches a tensor unverified (C5)."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from dscheck.codec.runs import Run, RunDecoder, stored_range
from dscheck.commit.contents import Contents
from dscheck.commit.stored import ADVICE
from dscheck.config import Settings
from dscheck.errors import CorruptCheckpointError, DeadlineError, DscheckError, StorageError
from dscheck.layout.boxes import Bools
from dscheck.load.needs import Need, Needs
from dscheck.load.place import Copies, Copy, Deliveries, is_plain
from dscheck.load.reads import Read, Reads
from dscheck.manifest.blocks import BlockTable, StoredBlocks
from dscheck.native import File, NativeReader, place
from dscheck.state.placements import Part
from dscheck.storage.base import LocalFiles, Requests, Storage

Checksums = Mapping[int, BlockTable]
"""Of each data file that is read from."""

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


class Reader:
    """The reads of one load into live tensors, several at once, in this order. A first error stops the rest.

    `with` it: when it is left, nothing is being placed any more. A read that hangs is left behind with its memory.
    """

    def __init__(
        self,
        storage: Storage,
        contents: Contents,
        checksums: Checksums,
        reads: Reads,
        kept: Bools,
        settings: Settings,
        deadline: float,
    ) -> None:
        """`kept`: the reads whose bytes are wanted once they are verified, besides by what they serve here."""
        self._storage = storage
        self._contents, self._checksums, self._deadline = contents, checksums, deadline
        self._reads, self._form = reads, _NativeForm(reads.needs)
        self._block_bytes = contents.plan.block_bytes
        self._deliveries = Deliveries()
        self._uses: Counter[int] = Counter()
        self._added = self._finished = 0
        self._file: tuple[int, File] | None = None
        self._error: BaseException | None = None
        self._longest = longest = int((reads.stop - reads.start).max(initial=0))
        coded = any(checksums[file].stored is not None for file in np.unique(reads.file).tolist())
        threads = min(_threads(storage, settings), len(reads))
        # A thread that decodes has what is stored in memory of its own.
        budget = settings.read_memory_bytes - (threads * longest if coded else 0)
        most = max(AT_ONCE, budget // (longest + BUFFER_EXTRA_BYTES))
        threads = min(threads, most)
        self._kept, self._delivers = kept, self._form.delivers(reads)
        waits = bool((kept | self._delivers).any())
        buffers = min(most, len(reads)) if waits else threads  # each costs its first touch
        device = _page_locked_for(reads.needs.targets)
        # Python's threads read all of it where they must decode some: buffers are given in the order of the reads.
        self._local = local = isinstance(storage, LocalFiles) and not coded
        self._native = NativeReader(threads if local else 0, buffers, longest, self._block_bytes, device)
        for number in range(0 if local else threads):
            threading.Thread(target=self._fill, name=f"dscheck-read-{number}", daemon=True).start()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self._native.stop()
        self._deliveries.finish()

    def finished(self) -> Iterator[int]:
        """The kept reads, by number, as they are verified and placed, until all reads are. Raises the first error, or
        DeadlineError on time.monotonic().
        """
        while self._finished < len(self._reads) or self._deliveries:
            self._add()
            number = self._next()
            if number is None:
                continue
            self._finished += 1
            delivers, kept = bool(self._delivers[number]), bool(self._kept[number])
            if delivers:
                needs = _delivered(self._reads[number])
                self._deliveries.start(self.bytes(number), needs, partial(self.release, number))
            self._uses[number] = delivers + kept
            if kept:
                yield number

    def bytes(self, number: int) -> torch.Tensor:
        """The verified bytes of a kept read, on the host, until `release`."""
        return torch.from_numpy(self._native.buffer(number))

    def release(self, number: int) -> None:
        """Give back the memory of a kept read."""
        self._uses[number] -= 1
        if not self._uses[number]:
            self._native.release(number)

    def place(self, read: Read, data: torch.Tensor) -> None:
        """The bytes of `read`, which another rank has verified, are placed, and verified again where they lie on the
        host. Raises CorruptCheckpointError.
        """
        needs = _delivered(read)
        if data.is_cpu or len(needs) < len(read.needs):
            form, every = _NativeForm(read.needs), slice(0, len(read.needs))
            blocks = form.blocks(every, read.start, self._checksums[read.file].checksums)
            damage = place(data.cpu().numpy(), self._block_bytes, blocks, form.copies(every, read.start))
            if damage is not None:
                offset, stored, found = damage
                raise self._corrupt(read, read.start + offset, stored, found)
        if needs:
            self._deliveries.start(data, needs)
            self._deliveries.tidy()

    def _add(self) -> None:
        reads = self._reads
        while self._added < len(reads) and self._added - self._finished < AHEAD:
            at = self._added
            file, start, stop = int(reads.file[at]), int(reads.start[at]), int(reads.stop[at])
            needs = slice(int(reads.begin[at]), int(reads.end[at]))
            crcs = self._checksums[file].checksums
            blocks, copies = self._form.blocks(needs, start, crcs), self._form.copies(needs, start)
            kept = bool(self._kept[at] or self._delivers[at])
            self._native.add(self._open(file), start, stop - start, blocks, copies, kept)
            self._added += 1

    def _open(self, rank: int) -> File | None:
        storage = self._storage
        if not (self._local and isinstance(storage, LocalFiles)):
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
        read = self._reads[number]
        storage, key = self._storage, self._contents.key(read.file)
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
        how = "read" if self._checksums[read.file].stored is None else "decoded"
        return self._damaged(read, offset, f"crc32c {stored:#010x} stored, {found:#010x} {how}")

    def _damaged(self, read: Read, offset: int, what: str) -> DscheckError:
        """`offset`: where the bad block lies by the plan."""
        key, coded = self._contents.key(read.file), self._checksums[read.file].stored
        start, stop = read.needs.extents()
        need = read.needs[int(np.argmax((start <= offset) & (offset < stop)))]
        if coded is not None:
            block = need.fragment.first_block + (offset - need.fragment.offset) // self._block_bytes
            offset = int(coded.starts[block])
        return CorruptCheckpointError(
            f"fragment '{need.row.name}' {need.fragment.region} of step {self._contents.record.step}: {what} from "
            f"'{self._storage.url}/{key}' at {offset}; {ADVICE}",
            key=key,
            tensor=need.row.name,
            offset=offset,
        )

    def _late(self) -> DscheckError:
        url = self._storage.url
        return DeadlineError(
            f"step {self._contents.record.step}: {len(self._reads) - self._finished} of {len(self._reads)} reads from "
            f"{url} did not end in time",
            phase="read",
            waited_for=url,
        )

    def _fill(self) -> None:
        """One thread that reads what native threads cannot."""
        storage, decoder, memory = self._storage, RunDecoder(self._block_bytes), bytearray()
        try:
            while (number := self._native.next_to_fill(self._deadline)) is not None:
                read, buffer = self._reads[number], self._native.buffer(number)
                coded = self._checksums[read.file].stored
                if coded is None:
                    storage.read_into(self._contents.key(read.file), read.start, buffer.data)
                else:
                    memory = memory or bytearray(self._longest)
                    self._fetch(number, coded, decoder, memoryview(memory), buffer)
                self._native.filled(number)
        except BaseException as error:
            self._error = self._error or error
            self._native.stop()

    def _fetch(
        self, number: int, coded: StoredBlocks, decoder: RunDecoder, memory: memoryview, out: NDArray[np.uint8]
    ) -> None:
        """The raw bytes of a read in `out`, from those of a coded file. Raises CorruptCheckpointError."""
        read = self._reads[number]
        runs = self._form.runs(slice(int(self._reads.begin[number]), int(self._reads.end[number])), read.start)
        start, stop = stored_range(coded, runs)
        if stop - start > len(out):
            raise self._damaged(read, read.start + runs[0].offset, f"{stop - start} bytes stored of {len(out)}")
        self._storage.read_into(self._contents.key(read.file), start, memory[: stop - start])
        for bad in decoder.decode(coded, runs, memory[: stop - start], out):
            raise self._damaged(read, read.start + bad.raw_offset, bad.what)


class _NativeForm:
    """Needs as native code takes them, made for all of them at once."""

    def __init__(self, needs: Needs) -> None:
        self._copies = Copies(needs)
        self._blocks = np.stack([*needs.blocks(), *needs.extents()], axis=1)

    def delivers(self, reads: Reads) -> Bools:
        """Of reads of these needs, which have some that torch is to write."""
        before = np.append(0, np.cumsum(~self._copies.plain))
        return before[reads.end] > before[reads.begin]

    def copies(self, needs: slice, start: int) -> list[Copy]:
        """What native code places of bytes that begin at `start` of their data file."""
        return self._copies.of(needs.start, needs.stop, start)

    def blocks(self, needs: slice, start: int, crcs: NDArray[np.uint32]) -> list[Blocks]:
        """What is to be verified of these bytes, each block once."""
        return [(run.offset, run.nbytes, crcs[run.first : run.last]) for run in self.runs(needs, start)]

    def runs(self, needs: slice, start: int) -> list[Run]:
        """Their blocks, each once, ascending."""
        found, verified, verified_to = [], -1, 0
        for first, last, begin, end in sorted(self._blocks[needs].tolist()):
            if first < verified:
                first, begin = verified, verified_to
            if first < last:
                found.append(Run(first, last, begin - start, end - begin))
                verified, verified_to = last, end
        return found


def _threads(storage: Storage, settings: Settings) -> int:
    """A read from afar mostly waits: there are as many at once as reach the storage's rate."""
    return max(settings.read_threads, storage.requests_in_flight if isinstance(storage, Requests) else 0)


def _delivered(read: Read) -> list[tuple[Need, int]]:
    """What torch has to write, each with where its fragment would begin in the bytes read, maybe before them."""
    found = (need for need in read.needs if not is_plain(need.target, need.row.dtype))
    return [(need, need.fragment.offset - read.start) for need in found]


def _page_locked_for(targets: Iterable[Part]) -> int:
    """The CUDA device that buffers are page-locked for, or -1: a copy from other memory is slow, and waits."""
    devices = (target.view.device for target in targets)
    return next((device.index or 0 for device in devices if device.type == "cuda"), -1)
