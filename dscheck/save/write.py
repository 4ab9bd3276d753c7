"""One rank's data file: its fragments in the order of the plan, their block checksums, then its objects."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dscheck.config import Settings
from dscheck.errors import DscheckError
from dscheck.manifest.files import Extent, FileRow
from dscheck.manifest.place import CHECKSUM_ALIGNMENT, align, block_count, place
from dscheck.save.fragments import Fragments
from dscheck.save.parts import JOINED_BYTES, Free, InParts
from dscheck.save.trace import Trace
from dscheck.snapshot import Chunk
from dscheck.storage.base import FileWriter, ObjectWriter, PartWriter, Storage

BATCH_BYTES = 8 << 20
"""What is shorter than JOINED_BYTES is copied, and written together once it comes to this."""

WRITE_BYTES = 32 << 20
"""Of one call: its return may have to wait 5 ms for the GIL, and a deadline is looked at before the next one."""


@dataclass(frozen=True, slots=True)
class Objects:
    """The sealed texts that end a data file: what should be equal on all ranks, and what is this rank's alone."""

    ours: bytes
    mine: bytes


class _Batched:
    """Joins small writes, so that thousands of scalars cost a few calls, and knows where in the file it is."""

    def __init__(self, writer: ObjectWriter, trace: Trace, stop: Callable[[], None], offset: int = 0) -> None:
        self._writer, self._trace, self._stop, self._batch = writer, trace, stop, bytearray()
        self.offset = offset

    def pad_to(self, offset: int) -> None:
        if offset > self.offset:
            self.write(bytes(offset - self.offset))

    def write(self, data: bytes | memoryview, free: Free | None = None) -> None:
        """Append `data`, which the caller may reuse when this returns; `free` tells it so."""
        self.offset += len(data)
        if len(data) < JOINED_BYTES:
            self._batch += data
            if len(self._batch) >= BATCH_BYTES:
                self.flush()
        else:
            self.flush()
            view = memoryview(data)
            for start in range(0, len(view), WRITE_BYTES):
                self._put(view[start : start + WRITE_BYTES])
        if free is not None:
            free()

    def flush(self) -> None:
        if self._batch:
            self._put(self._batch)
            self._batch = bytearray()

    def _put(self, data: memoryview | bytearray) -> None:
        self._stop()
        with self._trace.span("write", len(data)):
            self._writer.write(data)


Appending = _Batched | InParts


class DataFile:
    """The data file `key`, not there yet. `stop` is called between writes and raises to give up."""

    def __init__(self, storage: Storage, key: str, settings: Settings, trace: Trace, stop: Callable[[], None]) -> None:
        self._storage, self._key, self._trace, self._stop, self._settings = storage, key, trace, stop, settings
        self._block_bytes = settings.block_bytes

    def write(self, rank: int, sizes: Sequence[int], fragments: Iterable[Iterable[Chunk]], objects: Objects) -> FileRow:
        """Write it durably and return its row of files.arrow.

        `fragments` in the order of the plan, `sizes` their bytes; each chunk may change as soon as the next one is
        asked for. After any error, those that the chunks raise included, nothing is left that a reader could take for
        whole.
        """
        writer = self._storage.create(self._key)
        out: Appending
        try:
            if isinstance(fragments, Fragments) and fragments.fillable and isinstance(writer, FileWriter):
                out, crcs = self._fill(writer, fragments)
            else:
                out = self._appending(writer, sizes, fragments, objects)
                crcs = self._stream(out, sizes, fragments)
            out.pad_to(align(out.offset, CHECKSUM_ALIGNMENT))
            extents = [_append(out, text) for text in (crcs.astype("<u4").tobytes(), objects.ours, objects.mine)]
            out.flush()
            self._stop()
            with self._trace.span("commit the data file"):
                size = writer.commit()
        except BaseException:
            writer.abort()
            raise
        if size != out.offset:
            raise self._wrong(f"{size} bytes stored, {out.offset} written")
        return FileRow(rank, size, len(crcs), *extents)

    def _fill(self, writer: FileWriter, fragments: Fragments) -> tuple[_Batched, NDArray[np.uint32]]:
        """All fragments by native threads: the file is written up to where they end, and has these checksums."""
        end = fragments.layout.end
        with self._trace.span("fill the data file", end), writer.reserved(end) as file:
            crcs = fragments.fill(file, self._settings)
            if crcs is None:
                self._stop()
                raise self._wrong("not written in time")
        return _Batched(writer, self._trace, self._stop, end), crcs

    def _appending(
        self, writer: ObjectWriter, sizes: Sequence[int], fragments: Iterable[Iterable[Chunk]], objects: Objects
    ) -> Appending:
        """In parts, where the storage takes them and there is more than one."""
        _, blocks, end = place(sizes, self._block_bytes)
        nbytes = end + 4 * len(blocks) + len(objects.ours) + len(objects.mine)
        if not isinstance(writer, PartWriter) or nbytes <= writer.part_bytes(nbytes):
            return _Batched(writer, self._trace, self._stop)
        may_hold = (lambda: fragments.has_room) if isinstance(fragments, Fragments) else (lambda: False)
        return InParts(writer, nbytes, self._trace, self._stop, may_hold)

    def _stream(self, out: Appending, sizes: Sequence[int], fragments: Iterable[Iterable[Chunk]]) -> NDArray[np.uint32]:
        """The same, from this thread, in order."""
        checksums = []
        for offset, nbytes, chunks in zip(place(sizes, self._block_bytes)[0], sizes, _lent(fragments), strict=True):
            out.pad_to(offset)
            checksums += self._append(out, chunks, nbytes)
        return np.concatenate(checksums) if checksums else np.empty(0, np.uint32)

    def _append(
        self, out: Appending, chunks: Iterable[tuple[Chunk, Free | None]], nbytes: int
    ) -> list[NDArray[np.uint32]]:
        """One fragment; returns the checksums of its blocks, chunk by chunk.

        All but its last chunk are multiples of the block length.
        """
        end, checksums = out.offset + nbytes, []
        for chunk, free in chunks:
            checksums.append(chunk.checksums.copy())
            out.write(chunk.data.data, free)
        if out.offset != end or sum(map(len, checksums)) != block_count(nbytes, self._block_bytes):
            raise self._wrong(f"a fragment of {nbytes} bytes came as {nbytes + out.offset - end}, or in odd chunks")
        return checksums

    def _wrong(self, what: str) -> DscheckError:
        return DscheckError(f"{self._storage.url}/{self._key}: {what}", key=self._key)


def _lent(fragments: Iterable[Iterable[Chunk]]) -> Iterable[Iterable[tuple[Chunk, Free | None]]]:
    if isinstance(fragments, Fragments):
        return fragments.lent()
    return (((chunk, None) for chunk in chunks) for chunks in fragments)


def _append(out: Appending, text: bytes) -> Extent:
    extent = Extent(out.offset, len(text), hashlib.sha256(text).hexdigest())
    out.write(text)
    return extent
