"""Every byte of a committed step against what it should be: nothing is loaded, all damage is listed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from dscheck.commit.contents import Contents, gaps
from dscheck.errors import CheckpointNotFoundError, CorruptCheckpointError, StorageError
from dscheck.manifest.fragments import Fragments
from dscheck.manifest.place import by_file
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
    stored = contents.checksums([rank])[rank]
    step = max(block, READ_BYTES // block * block)
    buffer = memoryview(bytearray(step))
    for fragment in sorted(fragments, key=lambda fragment: fragment.offset):
        for start in range(0, fragment.nbytes, step):
            data = buffer[: min(step, fragment.nbytes - start)]
            contents.storage.read_into(key, fragment.offset + start, data)
            found = crc32c_blocks(data, block)
            first = fragment.first_block + start // block
            for bad in np.flatnonzero(found != stored[first : first + len(found)]):
                name = contents.plan.tensors[fragment.tensor].name
                yield Damage(
                    key,
                    fragment.offset + start + int(bad) * block,
                    f"tensor '{name}' {fragment.region}: crc32c {stored[first + bad]:#010x} stored, "
                    f"{found[bad]:#010x} read",
                )
            advance(len(data))
