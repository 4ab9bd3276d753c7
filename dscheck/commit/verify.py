"""Every byte of a committed step against what it should be: nothing is loaded, all damage is listed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dscheck.codec.runs import BadBlock, Run, RunDecoder, stored_range
from dscheck.commit.contents import Contents, gaps
from dscheck.errors import CheckpointNotFoundError, CorruptCheckpointError, StorageError
from dscheck.manifest.blocks import StoredBlocks
from dscheck.manifest.fragments import Fragments
from dscheck.manifest.place import block_count, by_file
from dscheck.native import crc32c_blocks

READ_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is wrong: in which object, from which byte on (None: as a whole), and what."""

    key: str
    offset: int | None
    what: str


def verify(contents: Contents, advance: Callable[[int], None]) -> Iterator[Damage]:
    """All damage of one step: files by size, objects and checksums by digest, every block by CRC32C, tensors by cover.

    `advance` is told the bytes of each block range when they have been read.
    """
    try:
        plan = contents.plan.whole()
    except CorruptCheckpointError as error:
        yield Damage(contents.plan.key, None, str(error))
        return
    for gap in gaps(plan):
        yield Damage(contents.plan.key, None, str(gap))
    order = by_file(plan.fragments.writer)
    ends = np.searchsorted(plan.fragments.writer[order], np.arange(len(plan.ranks) + 1))
    for file in contents.files:
        key = contents.key(file.rank)
        try:
            yield from _verify_size(contents, file.rank)
            contents.ours([file.rank])
            contents.mine(file.rank)
            mine = plan.fragments.take(order[ends[file.rank] : ends[file.rank + 1]])
            yield from _verify_blocks(contents, file.rank, mine, advance)
        except (CorruptCheckpointError, CheckpointNotFoundError, StorageError) as error:
            yield Damage(key, error.fields.get("offset"), str(error))


def _verify_size(contents: Contents, rank: int) -> Iterator[Damage]:
    key, expected = contents.key(rank), contents.files[rank].size
    found = {entry.key: entry.size for entry in contents.storage.list(key)}.get(key)
    if found is not None and found != expected:
        yield Damage(key, None, f"{expected} bytes recorded, {found} found")


def _verify_blocks(
    contents: Contents, rank: int, fragments: Fragments, advance: Callable[[int], None]
) -> Iterator[Damage]:
    key, block = contents.key(rank), contents.plan.block_bytes
    blocks = contents.checksums([rank])[rank]
    step = max(block, READ_BYTES // block * block)
    buffer = np.empty(step, np.uint8)
    coded = _Coded(contents, rank, blocks.stored, step) if blocks.stored is not None else None
    for fragment in sorted(fragments, key=lambda fragment: fragment.offset):
        name = f"tensor '{contents.plan.tensors[fragment.tensor].name}' {fragment.region}"
        for start in range(0, fragment.nbytes, step):
            data, failed = buffer[: min(step, fragment.nbytes - start)], set()
            first, begin = fragment.first_block + start // block, fragment.offset + start
            if coded is None:
                contents.storage.read_into(key, begin, data.data)
            else:
                for bad in coded.read(first, data):
                    failed.add(bad.raw_offset // block)
                    yield Damage(key, bad.offset, f"{name}: {bad.what}")
            found = crc32c_blocks(data.data, block)
            for number in np.flatnonzero(found != blocks.checksums[first : first + len(found)]).tolist():
                if number not in failed:
                    crcs = f"crc32c {blocks.checksums[first + number]:#010x} stored, {found[number]:#010x}"
                    where = begin + number * block if coded is None else coded.offset(first + number)
                    yield Damage(key, where, f"{name}: {crcs} {'read' if coded is None else 'decoded'}")
            advance(len(data))


class _Coded:
    """The raw bytes of one coded data file, `step` at most at a time."""

    def __init__(self, contents: Contents, rank: int, stored: StoredBlocks, step: int) -> None:
        self._contents, self._key, self._stored = contents, contents.key(rank), stored
        self._block = contents.plan.block_bytes
        self._decoder, self._memory = RunDecoder(self._block), memoryview(bytearray(step))

    def offset(self, block: int) -> int:
        return int(self._stored.starts[block])

    def read(self, first: int, out: NDArray[np.uint8]) -> Iterator[BadBlock]:
        """Fill `out` with the blocks from `first` on; those that are damaged are yielded."""
        run = Run(first, first + block_count(len(out), self._block), 0, len(out))
        start, stop = stored_range(self._stored, [run])
        if stop - start > len(out):
            yield BadBlock(start, 0, f"{stop - start} bytes stored of {len(out)}")
            return
        self._contents.storage.read_into(self._key, start, self._memory[: stop - start])
        yield from self._decoder.decode(self._stored, [run], self._memory[: stop - start], out)
