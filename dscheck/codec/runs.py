"""Reads of coded data files: what is stored of a range of raw bytes, and the raw bytes that it becomes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dscheck.codec.decode import Decoder
from dscheck.errors import LayoutError
from dscheck.manifest.blocks import Codec, StoredBlocks
from dscheck.native import crc32c


@dataclass(frozen=True, slots=True)
class Run:
    """Blocks [first, last) of one fragment, side by side: their raw bytes are [offset, offset + nbytes) of a read."""

    first: int
    last: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class BadBlock:
    """A stored block that is not what its table says: where it begins in the data file and, raw, in the read."""

    offset: int
    raw_offset: int
    what: str


def stored_range(stored: StoredBlocks, runs: Sequence[Run]) -> tuple[int, int]:
    """The bytes of the data file to read for these runs, which ascend."""
    return int(stored.starts[runs[0].first]), int(stored.starts[runs[-1].last])


class RunDecoder:
    """Decodes what was read of data files, one read after the other. Not for several threads."""

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes, self._decoder = block_bytes, Decoder()

    def decode(
        self, stored: StoredBlocks, runs: Sequence[Run], data: memoryview, out: NDArray[np.uint8]
    ) -> Iterator[BadBlock]:
        """Fill the runs in `out`, the read's raw bytes, from the bytes of their `stored_range`; what fails is yielded.

        Each block's checksum is compared before anything looks into it.
        """
        begin = stored_range(stored, runs)[0]
        for run in runs:
            at, end = run.offset, run.offset + run.nbytes
            for number in range(run.first, run.last):
                start, stop = int(stored.starts[number]), int(stored.starts[number + 1])
                length = min(self._block_bytes, end - at)
                what = self._decode(stored, number, data[start - begin : stop - begin], out[at : at + length])
                if what is not None:
                    yield BadBlock(start, at, what)
                at += length

    def _decode(self, stored: StoredBlocks, number: int, data: memoryview, out: NDArray[np.uint8]) -> str | None:
        expected, found = int(stored.checksums[number]), crc32c(data)
        if found != expected:
            return f"crc32c {expected:#010x} stored, {found:#010x} read"
        try:
            self._decoder.decode(data, Codec(int(stored.codecs[number])), out)
        except LayoutError as error:
            return str(error)
        return None
