"""From wanted regions to byte ranges: which blocks of which data files a rank needs, in few and bounded reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dscheck.errors import IncompleteCoverError
from dscheck.layout.cover import uncovered
from dscheck.layout.region import Region
from dscheck.manifest.dtypes import ITEMSIZE
from dscheck.manifest.fragments import Fragment
from dscheck.manifest.plan import Plan, TensorRow

READ_BYTES = 32 << 20
"""No read, and no buffer of one, is longer, unless a single row of a tensor is."""

GAP_BYTES = 64 << 10
"""Ranges that lie closer than this are read as one: a request costs more than the bytes between."""


@dataclass(frozen=True, slots=True)
class Need:
    """A box of one fragment that goes to `target`, and the blocks [first, last) of that fragment which hold it."""

    fragment: Fragment
    row: TensorRow
    box: Region
    first: int
    last: int
    target: Any

    def extent(self, block_bytes: int) -> tuple[int, int]:
        """The bytes of the data file that these blocks are."""
        begin = self.fragment.offset
        return begin + self.first * block_bytes, begin + min(self.last * block_bytes, self.fragment.nbytes)


@dataclass(frozen=True, slots=True)
class Read:
    """One range of one data file, and all needs that it serves."""

    rank: int
    start: int
    stop: int
    needs: tuple[Need, ...]


def needs_of(plan: Plan, tensor: int, wanted: Region, target: Any) -> Iterator[Need]:
    """What to read for one region of one tensor. Raises IncompleteCoverError with a box that no fragment has."""
    row = plan.tensors[tensor]
    overlaps = [
        (fragment, box)
        for fragment in plan.overlapping(tensor, wanted)
        if (box := fragment.region.intersect(wanted)) is not None
    ]
    gap = uncovered(wanted, [box for _, box in overlaps])
    if gap is not None:
        raise IncompleteCoverError(
            f"tensor '{row.name}': no fragment of the checkpoint holds {gap} of the wanted region {wanted}",
            tensor=row.name,
            missing=gap,
        )
    itemsize = ITEMSIZE[row.dtype]
    for fragment, box in overlaps:
        for part in _bounded(fragment.region, box, itemsize, plan.block_bytes):
            begin, end = _span(fragment.region, part, itemsize)
            yield Need(fragment, row, part, begin // plan.block_bytes, -(-end // plan.block_bytes), target)


def _strides(outer: Region, itemsize: int) -> list[int]:
    strides, step = [], itemsize
    for length in reversed(outer.shape):
        strides.append(step)
        step *= length
    return strides[::-1]


def _span(outer: Region, box: Region, itemsize: int) -> tuple[int, int]:
    """The first byte of `box` in the row-major bytes of `outer`, and the one behind its last."""
    strides = _strides(outer, itemsize)
    inner = box.relative_to(outer.start)
    begin = sum(a * stride for a, stride in zip(inner.start, strides, strict=True))
    last = sum((b - 1) * stride for b, stride in zip(inner.stop, strides, strict=True))
    return begin, last + itemsize


def _bounded(outer: Region, box: Region, itemsize: int, block_bytes: int) -> Iterator[Region]:
    """`box` in parts that span at most READ_BYTES each and skip what lies between far rows (a column of a wide
    matrix).
    """
    begin, end = _span(outer, box, itemsize)
    dim = next((d for d, length in enumerate(box.shape) if length > 1), None)
    if dim is None:
        yield box
        return
    stride = _strides(outer, itemsize)[dim]
    first_row = _rows(box, dim, box.start[dim], box.start[dim] + 1)
    row_begin, row_end = _span(outer, first_row, itemsize)
    sparse = stride - (row_end - row_begin) >= 2 * block_bytes
    if not sparse and end - begin <= READ_BYTES:
        yield box
        return
    rows = 1 if sparse else max(1, READ_BYTES // stride)
    for start in range(box.start[dim], box.stop[dim], rows):
        part = _rows(box, dim, start, min(start + rows, box.stop[dim]))
        if rows == 1:
            yield from _bounded(outer, part, itemsize, block_bytes)
        else:
            yield part


def _rows(box: Region, dim: int, start: int, stop: int) -> Region:
    return Region((*box.start[:dim], start, *box.start[dim + 1 :]), (*box.stop[:dim], stop, *box.stop[dim + 1 :]))


def reads_of(needs: Iterable[Need], block_bytes: int) -> list[Read]:
    """Needs sorted by place and joined where the gap is small, each read at most READ_BYTES unless one need is
    longer.
    """
    order = sorted(needs, key=lambda need: (need.fragment.writer, *need.extent(block_bytes)))
    reads: list[Read] = []
    batch: list[Need] = []
    start = stop = 0
    for need in order:
        begin, end = need.extent(block_bytes)
        near = batch and need.fragment.writer == batch[0].fragment.writer and begin - stop <= GAP_BYTES
        if not (near and max(stop, end) - start <= READ_BYTES):
            _close(reads, batch, start, stop)
            batch, start, stop = [], begin, begin
        batch.append(need)
        stop = max(stop, end)
    _close(reads, batch, start, stop)
    return reads


def _close(reads: list[Read], batch: Sequence[Need], start: int, stop: int) -> None:
    if batch:
        reads.append(Read(batch[0].fragment.writer, start, stop, tuple(batch)))
