"""From wanted regions to boxes of fragments, and which blocks hold them: columns, since a rank may need a million."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, overload

import numpy as np

from dscheck.errors import IncompleteCoverError
from dscheck.layout.boxes import Boxes, Ints, ints, spans
from dscheck.layout.cover import uncovered
from dscheck.layout.region import Region
from dscheck.layout.tiling import tiled_in_order
from dscheck.manifest.dtypes import ITEMSIZE
from dscheck.manifest.fragments import Fragment, Fragments
from dscheck.manifest.plan import TensorRow

READ_BYTES = 8 << 20
"""No need, and no read of several, is longer, but for the blocks at its ends."""

Want = tuple[int, Region, Any]
"""A tensor of the plan, a region of it, and the target of its bytes."""


class Plan(Protocol):
    """The fragments of a step, in memory or in the storage."""

    @property
    def tensors(self) -> tuple[TensorRow, ...]: ...
    @property
    def block_bytes(self) -> int: ...
    def overlapping(self, wanted: Sequence[tuple[int, Region]]) -> tuple[Fragments, Ints]: ...


@dataclass(frozen=True, slots=True)
class Need:
    """A box of one fragment that goes to `target`, and the blocks [first, last) of that fragment which hold it."""

    fragment: Fragment
    row: TensorRow
    box: Region
    first: int
    last: int
    target: Any


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """The fragments that overlap wanted regions: row i overlaps wanted[want[i]], `want` ascending.

    `low`, `high`: their bounds, [rows, ndim], with [0:1] behind the dimensions that a tensor has; `strides`: of their
    row-major bytes, alike; `itemsize`: bytes of an element.
    """

    tensors: tuple[TensorRow, ...]
    block_bytes: int
    wanted: Sequence[Want]
    rows: Fragments
    want: Ints
    low: Ints
    high: Ints
    strides: Ints
    itemsize: Ints

    @classmethod
    def of(cls, plan: Plan, wanted: Sequence[Want]) -> Source:
        rows, want = plan.overlapping([(tensor, region) for tensor, region, _ in wanted])
        low, high = rows.boxes.matrices(max((region.ndim for _, region, _ in wanted), default=0))
        itemsize = ints(ITEMSIZE[plan.tensors[tensor].dtype] for tensor, _, _ in wanted)[want]
        strides = np.ones_like(low)
        strides[:, :-1] = np.cumprod((high - low)[:, :0:-1], axis=1)[:, ::-1]
        strides *= itemsize[:, None]
        return cls(plan.tensors, plan.block_bytes, wanted, rows, want, low, high, strides, itemsize)


@dataclass(frozen=True, slots=True, eq=False)
class Needs(Sequence[Need]):
    """Boxes of fragments, one a row: need i is the box [start[i], stop[i]) of fragment[i], a row of the source, and
    the blocks [first[i], last[i]) of that fragment hold it.

    Bounds have the shape [needs, ndim], as those of the source. An object is made only for the row that is asked for.
    """

    source: Source
    fragment: Ints
    start: Ints
    stop: Ints
    first: Ints
    last: Ints

    @classmethod
    def joined(cls, parts: Sequence[Needs]) -> Needs:
        """The needs of all parts, of one source, in order."""
        assert all(part.source is parts[0].source for part in parts)
        return cls(parts[0].source, *map(np.concatenate, zip(*(part._columns() for part in parts), strict=True)))

    def __len__(self) -> int:
        return len(self.fragment)

    @overload
    def __getitem__(self, row: int) -> Need: ...
    @overload
    def __getitem__(self, row: slice) -> Needs: ...
    def __getitem__(self, row: int | slice) -> Need | Needs:
        if isinstance(row, slice):
            return Needs(self.source, *(column[row] for column in self._columns()))
        fragment = self.source.rows[int(self.fragment[row])]
        _, region, target = self.source.wanted[self.source.want[self.fragment[row]]]
        box = Region(*(tuple(bounds[row, : region.ndim].tolist()) for bounds in (self.start, self.stop)))
        tensor = self.source.tensors[fragment.tensor]
        return Need(fragment, tensor, box, int(self.first[row]), int(self.last[row]), target)

    def take(self, rows: Ints) -> Needs:
        """These needs, in this order."""
        return Needs(self.source, *(column[rows] for column in self._columns()))

    @property
    def file(self) -> Ints:
        """The rank that wrote each need's data file."""
        return self.source.rows.writer[self.fragment].astype(np.int64)

    @property
    def want(self) -> Ints:
        """Of which wanted region each is a part."""
        return self.source.want[self.fragment]

    @property
    def nbytes(self) -> int:
        """Of all boxes."""
        return int(((self.stop - self.start).prod(axis=1) * self.source.itemsize[self.fragment]).sum())

    @property
    def targets(self) -> list[Any]:
        """Each target that some box goes to."""
        return [self.source.wanted[want][2] for want in np.unique(self.want).tolist()]

    def extents(self) -> tuple[Ints, Ints]:
        """Where the blocks of each begin and end in its data file, in bytes."""
        rows, block_bytes = self.source.rows, self.source.block_bytes
        begin = rows.offset[self.fragment]
        ends = np.minimum(self.last * block_bytes, rows.nbytes[self.fragment])
        return begin + self.first * block_bytes, begin + ends

    def blocks(self) -> tuple[Ints, Ints]:
        """The same blocks by their numbers in the data file."""
        begin = self.source.rows.first_block[self.fragment]
        return begin + self.first, begin + self.last

    def _columns(self) -> tuple[Ints, ...]:
        return self.fragment, self.start, self.stop, self.first, self.last


def needs_of(plan: Plan, wanted: Sequence[Want]) -> Needs:
    """What to read for regions of tensors, each with its target.

    Raises IncompleteCoverError with a box that no fragment has.
    """
    source = Source.of(plan, wanted)
    low, high = Boxes.of([region for _, region, _ in wanted]).matrices(source.low.shape[1])
    want = source.want
    start, stop = np.maximum(source.low, low[want]), np.minimum(source.high, high[want])
    for number in np.flatnonzero(~tiled_in_order(want, high - low, start - low[want], stop - low[want])).tolist():
        _refuse_gap(source, number)
    return _bounded(source, np.arange(len(want)), start, stop)


def _refuse_gap(source: Source, number: int) -> None:
    tensor, region, _ = source.wanted[number]
    begin, end = np.searchsorted(source.want, [number, number + 1]).tolist()
    gap = uncovered(region, [row.region for row in source.rows[begin:end]])
    if gap is not None:
        name = source.tensors[tensor].name
        raise IncompleteCoverError(
            f"tensor '{name}': no fragment of the checkpoint holds {gap} of the wanted region {region}",
            tensor=name,
            missing=gap,
        )


def _bounded(source: Source, fragment: Ints, start: Ints, stop: Ints) -> Needs:
    """Boxes of fragments in parts that span at most READ_BYTES each and skip what lies between far rows (a column of a
    wide matrix).
    """
    done: list[Needs] = []
    block_bytes = source.block_bytes
    while True:
        strides, itemsize, shape = source.strides[fragment], source.itemsize[fragment], stop - start
        begin = ((start - source.low[fragment]) * strides).sum(axis=1)
        span = ((shape - 1) * strides).sum(axis=1) + itemsize
        dim, stride, length = _rows(shape, strides, itemsize)
        sparse = stride - (span - (length - 1) * stride) >= 2 * block_bytes
        whole = (length == 1) | (~sparse & (span <= READ_BYTES))
        first, last = begin // block_bytes, -(-(begin + span) // block_bytes)
        needs = Needs(source, fragment, start, stop, first, last)
        if whole.all():
            return Needs.joined([*done, needs]) if done else needs
        done.append(needs.take(np.flatnonzero(whole)))
        rows = np.where(sparse, 1, np.maximum(1, READ_BYTES // stride))
        cut = np.flatnonzero(~whole)
        count = -(-length[cut] // rows[cut])
        part, cut = spans(np.zeros_like(count), count), np.repeat(cut, count)
        fragment, start, stop = fragment[cut], start[cut], stop[cut]
        each, along = np.arange(len(cut)), dim[cut]
        start[each, along] += part * rows[cut]
        stop[each, along] = np.minimum(stop[each, along], start[each, along] + rows[cut])


def _rows(shape: Ints, strides: Ints, itemsize: Ints) -> tuple[Ints, Ints, Ints]:
    """Of boxes the first dimension that has several rows, how far these are apart, and how many there are: without
    such a dimension, one.
    """
    if not shape.shape[1]:
        return np.zeros_like(itemsize), itemsize, np.ones_like(itemsize)
    dim, each = np.argmax(shape > 1, axis=1), np.arange(len(shape))
    return dim, strides[each, dim], shape[each, dim]
