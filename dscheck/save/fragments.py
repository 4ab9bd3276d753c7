"""The fragments of one data file, from a capture: filled in by native threads, or handed on chunk by chunk."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dscheck.config import Settings
from dscheck.layout.region import Region
from dscheck.manifest.place import block_count, place
from dscheck.save.parts import Free
from dscheck.save.shares import Box
from dscheck.save.trace import Trace
from dscheck.snapshot import Capture, CapturePlan, Chunk, Placement
from dscheck.storage.local import write_all

Key = tuple[str, Region]

SLICE_BYTES = 8 << 20
"""Of one write of a native thread: what a save that was given up still has to wait for."""


class Layout:
    """Where the boxes that a rank writes lie in its data file. Made once for as long as plan and boxes stay the same.

    `sources`: the boxes' numbers in the plan of the capture, by key; what is not among them was captured late.
    """

    def __init__(self, plan: CapturePlan, boxes: tuple[Box, ...], sources: Mapping[Key, int], block_bytes: int) -> None:
        self.plan, self.boxes = plan, boxes
        self.sizes = [box.nbytes for box in boxes]
        self.numbers = [sources.get(box.key) for box in boxes]
        self.offsets, self.blocks, self.end = place(self.sizes, block_bytes)
        self.block_count = sum(block_count(size, block_bytes) for size in self.sizes)
        places = zip(self.numbers, self.offsets, self.blocks, strict=True)
        captured = {number: (offset, block) for number, offset, block in places if number is not None}
        self.placement = Placement.of(plan, captured)
        self.others = [at for at, number in enumerate(self.numbers) if number is None or number in self.placement.kept]

    def serves(self, plan: CapturePlan, boxes: tuple[Box, ...]) -> bool:
        return self.plan is plan and self.boxes is boxes


class Fragments:
    """The bytes of a layout's boxes, out of one capture and what was captured `late`, once, in one of two ways.

    Only the end of either is the proof that all are of one moment. Both raise as Capture.wait does.
    """

    def __init__(self, layout: Layout, capture: Capture, late: Mapping[Key, Chunk], trace: Trace) -> None:
        self.layout = layout
        self._capture, self._late, self._trace = capture, late, trace

    def __iter__(self) -> Iterator[Iterable[Chunk]]:
        """Each box in its turn, as chunks that are valid until the next one is asked for."""
        return (_in_turn(chunks) for chunks in self.lent())

    def lent(self) -> Iterator[Iterable[tuple[Chunk, Free | None]]]:
        """The same, each chunk valid until the call beside it; None: as long as this object lives.

        What was captured and is not among them is let go in its place: it would hold back what comes behind it.
        """
        capture, at = self._capture, 0
        for box, number in zip(self.layout.boxes, self.layout.numbers, strict=True):
            if number is None:
                yield ((self._late[box.key], None),)
                continue
            _let_go(capture, range(at, number))
            at = number + 1
            yield capture.lent(number)
        _let_go(capture, range(at, len(self.layout.plan.sizes)))
        self._await_proof()

    @property
    def has_room(self) -> bool:
        return self._capture.has_room

    @property
    def fillable(self) -> bool:
        return not self._capture.hashed

    def fill(self, file: int, settings: Settings) -> NDArray[np.uint32] | None:
        """Write all of it to its places in `file`, a descriptor, and return the CRC32C of each block of the file.

        None: the deadline has passed while the storage took its time. Raises OSError of a write as well.
        """
        layout, capture = self.layout, self._capture
        crcs = np.zeros(layout.block_count, np.uint32)
        capture.write(file, layout.placement, layout.end, direct=settings.direct_io, slice_bytes=_slice_bytes(settings))
        for at in layout.others:
            number, offset, block = layout.numbers[at], layout.offsets[at], layout.blocks[at]
            chunks = (self._late[layout.boxes[at].key],) if number is None else capture.chunks(number)
            for chunk in chunks:
                crcs[block : block + len(chunk.checksums)] = chunk.checksums
                write_all(file, chunk.data.data, offset)
                block, offset = block + len(chunk.checksums), offset + len(chunk.data)
        if not capture.await_written(crcs):
            return None
        self._await_proof()
        return crcs

    def _await_proof(self) -> None:
        with self._trace.span("await the proof"):
            self._capture.wait()


def _in_turn(chunks: Iterable[tuple[Chunk, Free | None]]) -> Iterator[Chunk]:
    for chunk, free in chunks:
        yield chunk
        if free is not None:
            free()


def _let_go(capture: Capture, numbers: Sequence[int]) -> None:
    for number in numbers:
        for _ in capture.chunks(number):
            pass


def _slice_bytes(settings: Settings) -> int:
    """A node's ranks share the device: each has its part of what may be under way."""
    local = os.environ.get("LOCAL_WORLD_SIZE", "")  # of torchrun
    ranks = int(local) if local.isdecimal() and local != "0" else 1
    return min(SLICE_BYTES, settings.io_bytes_in_flight // (ranks * settings.io_threads))
