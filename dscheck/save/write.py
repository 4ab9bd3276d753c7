"""One rank's data file: its fragments in the order of the plan, their block checksums, then its objects."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dscheck.config import Settings
from dscheck.errors import DscheckError
from dscheck.manifest.blocks import BlockTable, Codec
from dscheck.manifest.files import Extent, FileRow
from dscheck.manifest.place import CHECKSUM_ALIGNMENT, align, block_count, place
from dscheck.save.coded import write_coded
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
Lent = tuple[Chunk, Free | None]
"""A chunk, and what gives its memory back; None: it may change when the next one is asked for."""


class DataFile:
    """The data file `key`, not there yet. `stop` is called between writes and raises to give up."""

    def __init__(self, storage: Storage, key: str, settings: Settings, trace: Trace, stop: Callable[[], None]) -> None:
        self._storage, self._key, self._trace, self._stop, self._settings = storage, key, trace, stop, settings
        self._block_bytes = settings.block_bytes

    def write(
        self,
        rank: int,
        sizes: Sequence[int],
        fragments: Iterable[Iterable[Chunk]],
        objects: Objects,
        codecs: Sequence[Codec] = (),
    ) -> FileRow:
        """Write it durably and return its row of files.arrow.

        `fragments` in the order of the plan, `sizes` their bytes; each chunk may change as soon as the next one is
        asked for. `codecs`, one a fragment, make it a coded file. After any error, those that the chunks raise
        included, nothing is left that a reader could take for whole.
        """
        writer = self._storage.create(self._key)
        out: Appending
        try:
            fillable = isinstance(fragments, Fragments) and fragments.fillable
            if isinstance(fragments, Fragments) and fillable and isinstance(writer, FileWriter) and not codecs:
                out, blocks = self._fill(writer, fragments)
            else:
                out = self._appending(writer, sizes, fragments, objects)
                blocks = self._encode(out, sizes, fragments, codecs) if codecs else self._stream(out, sizes, fragments)
            out.pad_to(align(out.offset, CHECKSUM_ALIGNMENT))
            extents = [_append(out, text) for text in (blocks.encode(), objects.ours, objects.mine)]
            out.flush()
            self._stop()
            with self._trace.span("commit the data file"):
                size = writer.commit()
        except BaseException:
            writer.abort()
            raise
        if size != out.offset:
            raise self._wrong(f"{size} bytes stored, {out.offset} written")
        return FileRow(rank, size, len(blocks.checksums), *extents)

    def _fill(self, writer: FileWriter, fragments: Fragments) -> tuple[_Batched, BlockTable]:
        """All fragments by native threads: the file is written up to where they end, and has these checksums."""
        end = fragments.layout.end
        with self._trace.span("fill the data file", end), writer.reserved(end) as file:
            crcs = fragments.fill(file, self._settings)
            if crcs is None:
                self._stop()
                raise self._wrong("not written in time")
        return _Batched(writer, self._trace, self._stop, end), BlockTable(crcs)

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

    def _stream(self, out: Appending, sizes: Sequence[int], fragments: Iterable[Iterable[Chunk]]) -> BlockTable:
        """The same, from this thread, in order."""
        checksums = [np.empty(0, np.uint32)]
        for offset, nbytes, chunks in zip(place(sizes, self._block_bytes)[0], sizes, _lent(fragments), strict=True):
            out.pad_to(offset)
            for chunk, free in self._whole(chunks, nbytes):
                checksums.append(chunk.checksums.copy())
                out.write(chunk.data.data, free)
        return BlockTable(np.concatenate(checksums))

    def _encode(
        self, out: Appending, sizes: Sequence[int], fragments: Iterable[Iterable[Chunk]], codecs: Sequence[Codec]
    ) -> BlockTable:
        """The same, block behind block, as they are encoded."""
        whole = (self._whole(_own(chunks), nbytes) for nbytes, chunks in zip(sizes, fragments, strict=True))
        plain = ((chunk for chunk, _ in chunks) for chunks in whole)
        with self._trace.span("encode the data file", sum(sizes)):
            return write_coded(out.write, plain, codecs, self._block_bytes, self._settings.io_threads)

    def _whole(self, chunks: Iterable[Lent], nbytes: int) -> Iterator[Lent]:
        """The chunks of one fragment, all but the last multiples of the block length; raises when they are not it."""
        found = blocks = 0
        for chunk, free in chunks:
            found, blocks = found + len(chunk.data), blocks + len(chunk.checksums)
            yield chunk, free
        if found != nbytes or blocks != block_count(nbytes, self._block_bytes):
            raise self._wrong(f"a fragment of {nbytes} bytes came as {found}, or in odd chunks")

    def _wrong(self, what: str) -> DscheckError:
        return DscheckError(f"{self._storage.url}/{self._key}: {what}", key=self._key)


def _lent(fragments: Iterable[Iterable[Chunk]]) -> Iterable[Iterable[Lent]]:
    return fragments.lent() if isinstance(fragments, Fragments) else map(_own, fragments)


def _own(chunks: Iterable[Chunk]) -> Iterator[Lent]:
    return ((chunk, None) for chunk in chunks)


def _append(out: Appending, text: bytes) -> Extent:
    extent = Extent(out.offset, len(text), hashlib.sha256(text).hexdigest())
    out.write(text)
    return extent
