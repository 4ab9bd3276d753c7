"""A data file as opaque bytes: its stored blocks, and what is behind them, each proved when it is read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dscheck.commit.contents import Contents
from dscheck.commit.parts import Direct, Part
from dscheck.commit.stored import ADVICE, proved
from dscheck.errors import CorruptCheckpointError
from dscheck.layout.boxes import Ints
from dscheck.manifest.blocks import BlockTable
from dscheck.manifest.fragments import Fragments
from dscheck.manifest.place import block_count
from dscheck.native import crc32c
from dscheck.storage.base import Storage

CHUNK_BYTES = 8 << 20
"""What is read at a time, unless a single block is longer."""


@dataclass(frozen=True, slots=True, eq=False)
class FileBlocks:
    """The checksum blocks of one data file, ascending: where each lies, its bytes as stored, and their CRC32C."""

    offset: Ints
    nbytes: Ints
    crc32c: NDArray[np.uint32]


def stored_blocks(contents: Contents, ranks: Iterable[int]) -> dict[int, FileBlocks]:
    """The blocks of the data files of these saved ranks: one pass over the plan, of which only theirs is kept."""
    wanted = sorted(ranks)
    parts: dict[int, list[Fragments]] = defaultdict(list)
    for rows in contents.plan.batches():
        for rank in np.intersect1d(rows.writer, wanted).tolist():
            parts[rank].append(rows.take(np.flatnonzero(rows.writer == rank)))
    tables = contents.checksums(wanted)
    return {rank: _blocks(Fragments.joined(parts[rank]), tables[rank], contents.plan.block_bytes) for rank in wanted}


def verified(storage: Storage, contents: Contents, rank: int, blocks: FileBlocks) -> Iterator[bytes | memoryview]:
    """The data file of `rank` as it lies in `storage`, which may be another one than that of `contents`, in order.

    Each part has matched its checksum or digest before it is given out; what aligns blocks is given out as zeros,
    whatever is stored there. A part may not be used any more when the next but one is asked for.
    Raises CorruptCheckpointError, with the object and the byte, or CheckpointNotFoundError.
    """
    key, row = contents.key(rank), contents.files[rank]
    at = 0
    for begin, end in _chunks(blocks):
        start, stop = int(blocks.offset[begin]), int(blocks.offset[end - 1] + blocks.nbytes[end - 1])
        yield from _zeros(at, start)
        data = memoryview(bytearray(stop - start))
        storage.read_into(key, start, data)
        _prove(storage, key, blocks, begin, end, data)
        yield data
        at = stop
    yield from _zeros(at, row.checksums.offset)
    extents = (row.checksums, row.ours, row.mine)
    parts = [(Part(key, extent.offset, extent.size), extent.sha256) for extent in extents]
    yield from proved(storage.url, parts, Direct(storage))


def _blocks(fragments: Fragments, table: BlockTable, block_bytes: int) -> FileBlocks:
    if table.stored is not None:
        return FileBlocks(table.stored.starts[:-1], table.stored.sizes.astype(np.int64), table.stored.checksums)
    counts = block_count(fragments.nbytes, block_bytes)
    fragment = np.repeat(np.arange(len(fragments)), counts)
    number = np.arange(len(fragment)) - np.repeat(np.cumsum(counts) - counts, counts)
    offset = fragments.offset[fragment] + number * block_bytes
    nbytes = np.minimum(fragments.nbytes[fragment] - number * block_bytes, block_bytes)
    order = np.argsort(offset, kind="stable")
    return FileBlocks(offset[order], nbytes[order], table.checksums[(fragments.first_block[fragment] + number)[order]])


def _chunks(blocks: FileBlocks) -> Iterator[tuple[int, int]]:
    """Runs of blocks that are read together: rows [begin, end)."""
    ends, begin = blocks.offset + blocks.nbytes, 0
    while begin < len(ends):
        end = max(begin + 1, int(np.searchsorted(ends, blocks.offset[begin] + CHUNK_BYTES, side="right")))
        yield begin, end
        begin = end


def _prove(storage: Storage, key: str, blocks: FileBlocks, begin: int, end: int, data: memoryview) -> None:
    """Every block of `data` has its checksum; what lies between two of them becomes zeros."""
    start = at = int(blocks.offset[begin])
    rows = (column[begin:end].tolist() for column in (blocks.offset, blocks.nbytes, blocks.crc32c))
    for offset, nbytes, expected in zip(*rows, strict=True):
        data[at - start : offset - start] = bytes(offset - at)
        at = offset + nbytes
        found = crc32c(data[offset - start : at - start])
        if found != expected:
            raise CorruptCheckpointError(
                f"{storage.url}/{key}: bytes {offset} to {at}: crc32c {expected:#010x} stored, {found:#010x} read; "
                f"{ADVICE}",
                key=key,
                offset=offset,
            )


def _zeros(start: int, stop: int) -> Iterator[bytes]:
    for at in range(start, stop, CHUNK_BYTES):
        yield bytes(min(CHUNK_BYTES, stop - at))
