"""From wanted regions to byte ranges: which blocks of which data files a rank needs, in few and bounded reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dscheck.errors import IncompleteCoverError
from dscheck.layout.boxes import Bools, Boxes, Ints
from dscheck.layout.cover import uncovered
from dscheck.layout.region import Region
from dscheck.layout.tiling import tiled_in_order
from dscheck.manifest.dtypes import ITEMSIZE
from dscheck.manifest.fragments import Fragment, Fragments
from dscheck.manifest.plan import TensorRow

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


class Plan(Protocol):
    """The fragments of a step, in memory or in the storage."""

    @property
    def tensors(self) -> tuple[TensorRow, ...]: ...
    @property
    def block_bytes(self) -> int: ...
    def overlapping(self, wanted: Sequence[tuple[int, Region]]) -> list[Fragments]: ...


def needs_of(plan: Plan, wanted: Sequence[tuple[int, Region, Any]]) -> list[Need]:
    """What to read for regions of tensors, each with its target.

    Raises IncompleteCoverError with a box that no fragment has.
    """
    overlaps = plan.overlapping([(tensor, region) for tensor, region, _ in wanted])
    rows, want = Fragments.joined([*overlaps]), np.repeat(np.arange(len(wanted)), list(map(len, overlaps)))
    regions = Boxes.of([region for _, region, _ in wanted])
    ndim = int(regions.ndim.max(initial=0))
    low, high = regions.matrices(ndim)
    outer = rows.boxes.matrices(ndim)
    start, stop = np.maximum(outer[0], low[want]), np.minimum(outer[1], high[want])
    covered = tiled_in_order(want, high - low, start - low[want], stop - low[want])
    for number in np.flatnonzero(~covered).tolist():
        _refuse_gap(plan, wanted[number], overlaps[number])
    itemsize = np.array([ITEMSIZE[plan.tensors[tensor].dtype] for tensor, _, _ in wanted], np.int64)[want]
    begin, end, whole = _spans(*outer, start, stop, itemsize, plan.block_bytes)
    first, last = (begin // plan.block_bytes).tolist(), (-(-end // plan.block_bytes)).tolist()
    boxes = Boxes.cut(start, stop, regions.ndim[want])
    needs = []
    for number, (fragment, of, alone) in enumerate(zip(rows, want.tolist(), whole.tolist(), strict=True)):
        tensor, _, target = wanted[of]
        row, box = plan.tensors[tensor], boxes.region(number)
        if alone:
            needs.append(Need(fragment, row, box, first[number], last[number], target))
            continue
        for part in _bounded(fragment.region, box, ITEMSIZE[row.dtype], plan.block_bytes):
            a, b = _span(fragment.region, part, ITEMSIZE[row.dtype])
            needs.append(Need(fragment, row, part, a // plan.block_bytes, -(-b // plan.block_bytes), target))
    return needs


def _refuse_gap(plan: Plan, want: tuple[int, Region, Any], rows: Fragments) -> None:
    tensor, region, _ = want
    gap = uncovered(region, [row.region for row in rows])
    if gap is not None:
        name = plan.tensors[tensor].name
        raise IncompleteCoverError(
            f"tensor '{name}': no fragment of the checkpoint holds {gap} of the wanted region {region}",
            tensor=name,
            missing=gap,
        )


def _spans(
    outer_start: Ints, outer_stop: Ints, start: Ints, stop: Ints, itemsize: Ints, block_bytes: int
) -> tuple[Ints, Ints, Bools]:
    """`_span` of many boxes in many fragments, and which of them `_bounded` leaves whole."""
    lengths = outer_stop - outer_start
    strides = np.ones_like(lengths)
    strides[:, :-1] = np.cumprod(lengths[:, :0:-1], axis=1)[:, ::-1]
    strides *= itemsize[:, None]
    shape = stop - start
    begin = ((start - outer_start) * strides).sum(axis=1)
    span = ((shape - 1) * strides).sum(axis=1) + itemsize
    wide = shape > 1
    rows = np.arange(len(shape))
    dim = np.argmax(wide, axis=1) if wide.size else rows * 0
    stride, length = (strides[rows, dim], shape[rows, dim]) if wide.size else (itemsize, itemsize * 0 + 1)
    row_span = span - (length - 1) * stride
    whole = (length == 1) | ((stride - row_span < 2 * block_bytes) & (span <= READ_BYTES))
    return begin, begin + span, whole


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
