"""What a data file says of its blocks: checksums, and in a coded file how each is stored. Source: docs/format.md.

A coded file has its blocks back to back in the order of their numbers, whatever the plan's offsets are: those are of
the raw bytes, by which all reading is planned.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from dscheck.errors import LayoutError
from dscheck.layout.boxes import Ints
from dscheck.manifest.place import CHECKSUM_ALIGNMENT, align

CRC_BYTES = 4
CODED_BYTES = 13
"""Of one block in a plain file's checksums, and in a coded one's."""

Crcs = NDArray[np.uint32]


class Codec(IntEnum):
    """How a block is stored. SHUFFLE_n: byte i of each element of n bytes comes to plane i, each plane to zstd."""

    RAW = 0
    ZSTD = 1
    SHUFFLE_2 = 2
    SHUFFLE_4 = 3
    SHUFFLE_8 = 4

    @property
    def width(self) -> int:
        """Bytes of an element that is taken apart; 1: none is."""
        return {Codec.SHUFFLE_2: 2, Codec.SHUFFLE_4: 4, Codec.SHUFFLE_8: 8}.get(self, 1)

    def __str__(self) -> str:
        return {Codec.RAW: "none", Codec.ZSTD: "zstd"}.get(self, "shuffle-zstd")


@dataclass(frozen=True, slots=True, eq=False)
class StoredBlocks:
    """By block number: CRC32C and size of the stored bytes, and the codec. `starts`, one longer: where they lie."""

    checksums: Crcs
    sizes: NDArray[np.uint32]
    codecs: NDArray[np.uint8]
    starts: Ints

    @classmethod
    def of(cls, checksums: Crcs, sizes: NDArray[np.uint32], codecs: NDArray[np.uint8]) -> StoredBlocks:
        starts = np.zeros(len(sizes) + 1, np.int64)
        np.cumsum(sizes, out=starts[1:])
        return cls(checksums, sizes, codecs, starts)


@dataclass(frozen=True, slots=True, eq=False)
class BlockTable:
    """The CRC32C of each raw block of a data file; `stored` is None in a plain one, whose blocks are stored raw."""

    checksums: Crcs
    stored: StoredBlocks | None = None

    def encode(self) -> bytes:
        raw = self.checksums.astype("<u4").tobytes()
        if self.stored is None:
            return raw
        stored = self.stored
        return b"".join(
            (
                raw,
                stored.checksums.astype("<u4").tobytes(),
                stored.sizes.astype("<u4").tobytes(),
                stored.codecs.tobytes(),
            )
        )

    @classmethod
    def decode(cls, data: bytes, blocks: int, offset: int, block_bytes: int) -> BlockTable:
        """Of `blocks` blocks, from `data` at `offset` of the data file, proved by its digest.

        Raises LayoutError for codecs that are not known, and sizes that cannot be or do not end where `data` begins.
        """
        if not is_coded(len(data), blocks):
            return cls(np.frombuffer(data, "<u4"))
        checksums, found, sizes = np.frombuffer(data, "<u4", 3 * blocks).reshape(3, blocks)
        codecs = np.frombuffer(data, np.uint8, offset=12 * blocks)
        stored = StoredBlocks.of(found, sizes, codecs)
        if int(codecs.max()) > max(Codec):
            raise LayoutError(f"block {int(codecs.argmax())} has the unknown codec {int(codecs.max())}")
        if int(sizes.min()) < 1 or int(sizes.max()) > block_bytes:
            raise LayoutError(
                f"stored blocks of {int(sizes.min())} to {int(sizes.max())} bytes, 1 to {block_bytes} expected"
            )
        if align(int(stored.starts[-1]), CHECKSUM_ALIGNMENT) != offset:
            raise LayoutError(f"{int(stored.starts[-1])} bytes of stored blocks, and checksums at {offset}")
        return cls(checksums, stored)


def is_coded(checksum_bytes: int, blocks: int) -> bool:
    """Whether a data file with so many bytes of checksums for its blocks is a coded one."""
    return blocks > 0 and checksum_bytes == blocks * CODED_BYTES
