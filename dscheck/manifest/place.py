"""Where fragments lie in one data file. Source: docs/format.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

from dscheck.layout.boxes import MAX_ITEMS, Bools, Int32s, Ints, opens

N = TypeVar("N", int, Ints)
"""One number, or a column of them."""

LARGE_BYTES = 1 << 20
"""Fragments of this size and more begin on a page, so that direct I/O can read them alone."""

LARGE_ALIGNMENT = 4096
SMALL_ALIGNMENT = 64
CHECKSUM_ALIGNMENT = 8


def align(offset: N, alignment: int) -> N:
    """The first multiple of `alignment` at or after `offset`.

    >>> align(65, 64)
    128
    """
    return -(-offset // alignment) * alignment


def alignment_of(nbytes: Ints) -> Ints:
    """What the offset of each fragment of `nbytes` is a multiple of.

    Pages for small ones too would cost more than their bytes: a (64, 64, 3, 3) tensor in 1,000 flat ranges grew
    100 times.
    """
    return np.where(nbytes >= LARGE_BYTES, LARGE_ALIGNMENT, SMALL_ALIGNMENT)


def block_count(nbytes: N, block_bytes: int) -> N:
    """How many checksum blocks a fragment has, or each of many; only the last may be short.

    >>> block_count(2**18 + 1, 2**18)
    2
    """
    return -(-nbytes // block_bytes)


def by_file(writer: Int32s | Ints) -> Ints:
    """Rows in the order of their writers, those of one writer in the order they have."""
    low, high = int(writer.min(initial=0)), int(writer.max(initial=0))
    narrow = writer.astype(np.uint16) if low >= 0 and high < 1 << 16 else writer  # NumPy sorts 16 bits by radix
    return np.argsort(narrow, kind="stable")


def some_files(writer: Int32s, order: Ints) -> Iterator[Ints]:
    """`order`, rows by their writers, in parts of whole files that are worked on at a time."""
    begin = 0
    while begin < len(order):
        end = begin + MAX_ITEMS
        if end < len(order):
            file = int(writer[order[end - 1]])
            while end < len(order) and writer[order[end]] == file:
                end += 1
        yield order[begin:end]
        begin = end


def place(sizes: Sequence[int], block_bytes: int) -> tuple[list[int], list[int], int]:
    """Offsets and first blocks of fragments of `sizes` bytes, written in this order, and where the last one ends.

    The block checksums begin at `align(end, CHECKSUM_ALIGNMENT)`.
    >>> place([100, 1 << 20, 8], 1 << 18)
    ([0, 4096, 1052672], [0, 1, 5], 1052680)
    """
    nbytes = np.array(sizes, np.int64)
    offsets, first_blocks = place_all(np.zeros(len(sizes), np.int32), nbytes, block_bytes)
    return offsets.tolist(), first_blocks.tolist(), int((offsets + nbytes).max(initial=0))


def place_all(writer: Int32s, nbytes: Ints, block_bytes: int) -> tuple[Ints, Ints]:
    """Offset and first block of each fragment in the data file of its writer; each file is in the order of the rows."""
    offsets, first_blocks = np.empty_like(nbytes), np.empty_like(nbytes)
    for rows in some_files(writer, by_file(writer)):
        offsets[rows], first_blocks[rows] = _placed(opens(writer[rows]), nbytes[rows], block_bytes)
    return offsets, first_blocks


def _placed(file: Bools, sizes: Ints, block_bytes: int) -> tuple[Ints, Ints]:
    """The same of fragments file by file; `file` says where one begins."""
    small = align(sizes, SMALL_ALIGNMENT)
    # A run is a large fragment, or the begin of a file, and the small ones behind it; runs begin on pages.
    run = file | (sizes >= LARGE_BYTES)
    runs, number = np.flatnonzero(run), np.cumsum(run) - 1
    of_file = np.maximum.accumulate(np.where(file[runs], np.arange(len(runs)), 0))
    before = np.cumsum(small) - small
    length = align(np.add.reduceat(small, runs), LARGE_ALIGNMENT)
    begin = np.cumsum(length) - length
    blocks = block_count(sizes, block_bytes)
    counted = np.cumsum(blocks) - blocks
    offsets = (begin - begin[of_file])[number] + before - before[runs][number]
    return offsets, counted - counted[runs[of_file]][number]
