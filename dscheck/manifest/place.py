"""Where fragments lie in one data file. Source: docs/format.md."""

from __future__ import annotations

from collections.abc import Sequence

LARGE_BYTES = 1 << 20
"""Fragments of this size and more begin on a page, so that direct I/O can read them alone."""

LARGE_ALIGNMENT = 4096
SMALL_ALIGNMENT = 64
CHECKSUM_ALIGNMENT = 8


def align(offset: int, alignment: int) -> int:
    """The first multiple of `alignment` at or after `offset`.

    >>> align(65, 64)
    128
    """
    return -(-offset // alignment) * alignment


def alignment_of(nbytes: int) -> int:
    """What the offset of a fragment of `nbytes` is a multiple of.

    Pages for small ones too would cost more than their bytes: a (64, 64, 3, 3) tensor in 1,000 flat ranges grew
    100 times.
    """
    return LARGE_ALIGNMENT if nbytes >= LARGE_BYTES else SMALL_ALIGNMENT


def block_count(nbytes: int, block_bytes: int) -> int:
    """How many checksum blocks a fragment has; only the last may be short.

    >>> block_count(2**18 + 1, 2**18)
    2
    """
    return -(-nbytes // block_bytes)


def place(sizes: Sequence[int], block_bytes: int) -> tuple[list[int], list[int], int]:
    """Offsets and first blocks of fragments of `sizes` bytes, written in this order, and where the last one ends.

    The block checksums begin at `align(end, CHECKSUM_ALIGNMENT)`.
    >>> place([100, 1 << 20, 8], 1 << 18)
    ([0, 4096, 1052672], [0, 1, 5], 1052680)
    """
    offsets, first_blocks, end, blocks = [], [], 0, 0
    for nbytes in sizes:
        offset = align(end, alignment_of(nbytes))
        offsets.append(offset)
        first_blocks.append(blocks)
        end = offset + nbytes
        blocks += block_count(nbytes, block_bytes)
    return offsets, first_blocks, end
