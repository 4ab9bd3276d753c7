"""From a stored block to its raw bytes, of which there are exactly as many as there must be (TRAPS 36)."""

from __future__ import annotations

import numpy as np
import zstandard
from numpy.typing import NDArray

from dscheck.errors import LayoutError
from dscheck.manifest.blocks import Codec
from dscheck.native import unshuffle

PLANE_SIZE_BYTES = 4
LEAST_WINDOW = 1 << 10
"""What a frame asks for at least, however short it is."""


class Decoder:
    """Decodes one block at a time. Not for several threads."""

    def __init__(self) -> None:
        self._decompressor = zstandard.ZstdDecompressor()
        self._planes = np.empty(0, np.uint8)

    def decode(self, data: memoryview, codec: Codec, out: NDArray[np.uint8]) -> None:
        """Fill `out`, one raw block, from stored bytes that have matched their checksum.

        Raises LayoutError, without having allocated more than `out` has, for any that are not such a block.
        """
        if codec is Codec.RAW:
            if len(data) != len(out):
                raise LayoutError(f"{len(data)} bytes stored raw, {len(out)} expected")
            out[:] = data
        elif len(data) >= len(out):
            raise LayoutError(f"{len(data)} bytes stored by '{codec}', less than {len(out)} expected")
        elif codec is Codec.ZSTD:
            self._decompress(data, out)
        else:
            self._unshuffle(data, codec.width, out)

    def _unshuffle(self, data: memoryview, width: int, out: NDArray[np.uint8]) -> None:
        head = width * PLANE_SIZE_BYTES
        if len(out) % width or len(data) < head:
            raise LayoutError(f"{len(data)} bytes stored of {len(out)}, as planes of elements of {width}")
        ends = head + np.cumsum(np.frombuffer(data[:head], "<u4").astype(np.int64))
        if int(ends[-1]) != len(data):
            raise LayoutError(f"planes that end at {int(ends[-1])}, in a block of {len(data)} bytes")
        if len(self._planes) < len(out):
            self._planes = np.empty(len(out), np.uint8)
        length, begin = len(out) // width, head
        for number, end in enumerate(ends.tolist()):
            plane = self._planes[number * length : (number + 1) * length]
            if end - begin == length:
                plane[:] = data[begin:end]
            else:
                self._decompress(data[begin:end], plane)
            begin = end
        unshuffle(self._planes[: len(out)].data, width, out)

    def _decompress(self, data: memoryview, out: NDArray[np.uint8]) -> None:
        size = len(out)
        try:
            frame = zstandard.get_frame_parameters(data)
            if frame.content_size != size or frame.window_size > max(size, LEAST_WINDOW) or frame.dict_id:
                raise LayoutError(
                    f"a frame of {frame.content_size} bytes with a window of {frame.window_size} and dictionary "
                    f"{frame.dict_id}, {size} bytes expected"
                )
            raw = self._decompressor.decompress(data, max_output_size=size, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise LayoutError(f"no zstd frame of {size} bytes: {error}") from None
        if len(raw) != size:
            raise LayoutError(f"{len(raw)} bytes decompressed, {size} expected")
        out[:] = np.frombuffer(raw, np.uint8)
