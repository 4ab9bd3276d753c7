"""From raw blocks to stored ones, several at a time in threads without the GIL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import zstandard
from numpy.typing import NDArray

from dscheck.manifest.blocks import Codec, Crcs
from dscheck.native import crc32c_parts, shuffle_blocks

if TYPE_CHECKING:
    Part = bytes | memoryview
    """Of a stored block: a frame, which only looks like bytes, raw bytes, or the sizes of planes."""

LEVEL = 1
"""Of zstd. Mantissas do not compress at any, and 3 makes planes no smaller (docs/codecs.md)."""

LEAST_BYTES = 512
"""Shorter blocks stay raw: a frame has 20 bytes of its own."""


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """Stored blocks side by side in `data`, and of each its CRC32C, size and codec."""

    data: bytes | memoryview
    checksums: Crcs
    sizes: NDArray[np.uint32]
    codecs: NDArray[np.uint8]


class Encoder:
    """Compresses batches of blocks, each block alone. One batch at a time; its memory for planes is kept."""

    def __init__(self, block_bytes: int, threads: int) -> None:
        self._block_bytes, self._threads = block_bytes, threads
        self._compressor = zstandard.ZstdCompressor(level=LEVEL)
        self._planes = np.empty(0, np.uint8)

    def encode(self, data: memoryview, codec: Codec) -> Encoded:
        """`data` is one or more blocks of whole elements, the last one may be short. What does not shrink is stored
        raw.
        """
        blocks = [data[at : at + self._block_bytes] for at in range(0, len(data), self._block_bytes)]
        coded = self._zstd(blocks) if codec is Codec.ZSTD else self._shuffled(data, codec.width)
        parts: list[Part] = []
        sizes, codecs = np.empty(len(blocks), np.uint32), np.empty(len(blocks), np.uint8)
        for number, (block, smaller) in enumerate(zip(blocks, coded, strict=True)):
            size = sum(map(len, smaller))
            shrunk = size < len(block)
            parts += smaller if shrunk else [block]
            sizes[number], codecs[number] = (size, codec) if shrunk else (len(block), Codec.RAW)
        stored = b"".join(parts)
        return Encoded(stored, crc32c_parts(stored, sizes), sizes, codecs)

    def _zstd(self, blocks: list[memoryview]) -> list[list[Part]]:
        return [[frame] for frame in self._frames(blocks)]

    def _shuffled(self, data: memoryview, width: int) -> list[list[Part]]:
        """Of each block the sizes of its planes, then the planes: a frame with several would share a Huffman table
        between exponents and mantissas.
        """
        if len(self._planes) < len(data):
            self._planes = np.empty(len(data), np.uint8)
        shuffle_blocks(data, width, self._block_bytes, self._planes[: len(data)])
        shuffled, planes = self._planes.data, []
        for at in range(0, len(data), self._block_bytes):
            length = min(self._block_bytes, len(data) - at) // width
            planes += [shuffled[start : start + length] for start in range(at, at + width * length, length)]
        frames = self._frames(planes)
        smaller = [frame if len(frame) < len(plane) else plane for frame, plane in zip(frames, planes, strict=True)]
        of_blocks = [smaller[at : at + width] for at in range(0, len(smaller), width)]
        return [[np.array(list(map(len, parts)), "<u4").tobytes(), *parts] for parts in of_blocks]

    def _frames(self, parts: list[memoryview]) -> list[Part]:
        given: list[bytes | bytearray | memoryview] = [*parts]
        frames = self._compressor.multi_compress_to_buffer(given, threads=self._threads)
        return [memoryview(frames[number]) for number in range(len(frames))]  # type: ignore[arg-type]


def raw(data: memoryview, checksums: Crcs, block_bytes: int) -> Encoded:
    """`data` as it is; `checksums` are those of its blocks."""
    sizes = np.full(len(checksums), block_bytes, np.uint32)
    sizes[-1:] = len(data) - (len(checksums) - 1) * block_bytes
    return Encoded(data, checksums, sizes, np.zeros(len(checksums), np.uint8))
