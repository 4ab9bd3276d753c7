"""One rank's data file: its fragments in the order of the plan, their block checksums, then its objects."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from dscheck.errors import DscheckError
from dscheck.manifest.files import Extent, FileRow
from dscheck.manifest.place import CHECKSUM_ALIGNMENT, align, place
from dscheck.native import crc32c_blocks
from dscheck.storage.base import ObjectWriter, Storage

WRITE_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Objects:
    """The sealed texts that end a data file: what should be equal on all ranks, and what is this rank's alone."""

    ours: bytes
    mine: bytes


class _Batched:
    """Joins small writes, so that thousands of scalars cost a few calls, and knows where in the file it is."""

    def __init__(self, writer: ObjectWriter, stop: Callable[[], None]) -> None:
        self._writer, self._stop, self._batch = writer, stop, bytearray()
        self.offset = 0

    def pad_to(self, offset: int) -> None:
        if offset > self.offset:
            self.write(bytes(offset - self.offset))

    def write(self, data: bytes | memoryview) -> None:
        self.offset += len(data)
        if len(data) < WRITE_BYTES // 8:
            self._batch += data
            if len(self._batch) >= WRITE_BYTES:
                self.flush()
            return
        self.flush()
        view = memoryview(data)
        for start in range(0, len(view), WRITE_BYTES):
            self._stop()
            self._writer.write(view[start : start + WRITE_BYTES])

    def flush(self) -> None:
        self._stop()
        if self._batch:
            self._writer.write(self._batch)
            self._batch = bytearray()


def write_file(
    storage: Storage,
    key: str,
    rank: int,
    fragments: Iterable[torch.Tensor],
    objects: Objects,
    block_bytes: int,
    stop: Callable[[], None],
) -> FileRow:
    """Write `key` durably and return its row of files.arrow.

    `fragments` are host bytes (1-D uint8) in the order of the plan; they must not change until this returns. `stop` is
    called between writes and raises to give up. After any error nothing is left that a reader could take for whole.
    """
    pieces = [memoryview(piece.numpy().data) for piece in fragments]
    offsets, _, _ = place([piece.nbytes for piece in pieces], block_bytes)
    writer = storage.create(key)
    try:
        out = _Batched(writer, stop)
        checksums = []
        for offset, piece in zip(offsets, pieces, strict=True):
            out.pad_to(offset)
            out.write(piece)
            checksums.append(crc32c_blocks(piece, block_bytes))
        out.pad_to(align(out.offset, CHECKSUM_ALIGNMENT))
        crcs = np.concatenate(checksums) if checksums else np.empty(0, np.uint32)
        extents = [_append(out, text) for text in (crcs.astype("<u4").tobytes(), objects.ours, objects.mine)]
        out.flush()
        size = writer.commit()
    except BaseException:
        writer.abort()
        raise
    if size != out.offset:
        raise DscheckError(f"{storage.url}/{key}: {size} bytes stored, {out.offset} written", key=key)
    return FileRow(rank, size, len(crcs), *extents)


def _append(out: _Batched, text: bytes) -> Extent:
    extent = Extent(out.offset, len(text), hashlib.sha256(text).hexdigest())
    out.write(text)
    return extent
