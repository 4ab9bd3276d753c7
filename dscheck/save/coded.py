"""The blocks of a data file that are compressed: threads encode one batch while the one before it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np

from dscheck.codec.encode import LEAST_BYTES, Encoded, Encoder, raw
from dscheck.manifest.blocks import BlockTable, Codec, Crcs, StoredBlocks
from dscheck.save.parts import Free
from dscheck.snapshot import Chunk

BATCH_BYTES = 16 << 20
"""Encoded at a time. Four times as much is in memory: planes, frames, what is joined of them, and the batch before."""

Write = Callable[[bytes | memoryview, Free | None], None]
"""Appends bytes, which may be reused when it returns, or, with a `Free`, once that was called."""


class CodedBlocks:
    """Writes the blocks of one data file, in order. `with` it: when it is left nothing reads the given bytes."""

    def __init__(self, write: Write, block_bytes: int, threads: int) -> None:
        self._write, self._block_bytes = write, block_bytes
        self._encoder = Encoder(block_bytes, threads)
        self._thread = ThreadPoolExecutor(1, "dscheck-encode")
        self._pending: Future[Encoded] | None = None
        self._raw: list[Crcs] = []
        self._stored: list[Encoded] = []

    def __enter__(self) -> CodedBlocks:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()

    def add(self, chunks: Iterable[Chunk], codec: Codec) -> None:
        """One fragment, whose chunks may change as soon as the next one is asked for."""
        for chunk in chunks:
            self._raw.append(chunk.checksums.copy())
            self._add(chunk.data.data, self._raw[-1], codec)

    def finish(self) -> BlockTable:
        """Write what is left; the table of all blocks."""
        self._write_pending()
        checksums = np.concatenate([np.empty(0, np.uint32), *self._raw])
        if not len(checksums):
            return BlockTable(checksums)
        columns = zip(*((one.checksums, one.sizes, one.codecs) for one in self._stored), strict=True)
        return BlockTable(checksums, StoredBlocks.of(*map(np.concatenate, columns)))

    def _add(self, data: memoryview, checksums: Crcs, codec: Codec) -> None:
        if codec is Codec.RAW or len(data) < LEAST_BYTES:
            self._write_pending()
            self._put(raw(data, checksums, self._block_bytes))
            return
        batch = BATCH_BYTES // self._block_bytes * self._block_bytes or self._block_bytes
        future = None
        for start in range(0, len(data), batch):
            future = self._thread.submit(self._encoder.encode, data[start : start + batch], codec)
            self._write_pending()
            self._pending = future
        wait([future] if future else [])

    def _write_pending(self) -> None:
        if self._pending is not None:
            encoded, self._pending = self._pending.result(), None
            self._put(encoded)

    def _put(self, encoded: Encoded) -> None:
        self._write(encoded.data, _dropped if isinstance(encoded.data, bytes) else None)
        self._stored.append(Encoded(b"", encoded.checksums, encoded.sizes, encoded.codecs))


def _dropped() -> None:
    """Of bytes that nobody else has, and that last as long as they are needed."""


def write_coded(
    write: Write, fragments: Iterable[Iterable[Chunk]], codecs: Sequence[Codec], block_bytes: int, threads: int
) -> BlockTable:
    """All fragments, each by its codec, one behind the other; the table of their blocks.

    Raises what `write` and the chunks do.
    """
    with CodedBlocks(write, block_bytes, threads) as blocks:
        for chunks, codec in zip(fragments, codecs, strict=True):
            blocks.add(chunks, codec)
        return blocks.finish()
