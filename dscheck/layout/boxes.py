"""Boxes of many tensors as columns: plans of millions of regions are worked on without an object for each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dscheck.errors import LayoutError
from dscheck.layout.region import Region

Ints = NDArray[np.int64]
Int32s = NDArray[np.int32]
Bools = NDArray[np.bool_]
N = TypeVar("N", bound=np.generic)

MAX_ITEMS = 1 << 22
"""Bounds that are worked on at a time: what a pass over a plan needs beside the plan stays below a few 100 MB."""


def ints(values: Iterable[int]) -> Ints:
    """Raises LayoutError for a number over 64 bits."""
    try:
        return np.array(list(values), np.int64)
    except OverflowError as error:
        raise LayoutError("a number of the plan exceeds 64 bits") from error


def spans(begin: Ints, count: Ints) -> Ints:
    """The integers from begin[i] on, count[i] of them, one span after the other.

    >>> spans(np.array([7, 2]), np.array([2, 3])).tolist()
    [7, 8, 2, 3, 4]
    """
    before = np.cumsum(count) - count
    found: Ints = np.arange(int(count.sum())) + np.repeat(begin - before, count)
    return found


def opens(*columns: NDArray[np.generic]) -> Bools:
    """Which rows differ from the one before in any of the columns; the first one does."""
    found = np.ones(len(columns[0]), np.bool_)
    found[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return found


def joined(parts: list[NDArray[N]], dtype: type[N]) -> NDArray[N]:
    """All parts, one after the other. Empties the list on the way, so that little more than one copy is in memory."""
    end = sum(map(len, parts))
    found = np.empty(end, dtype)
    while parts:
        part = parts.pop()
        found[end - len(part) : end] = part
        end -= len(part)
    return found


def padded(shapes: Sequence[Sequence[int]], ndim: int) -> Ints:
    """Shapes as rows of `ndim` columns, with ones behind the dimensions that a shape has. Shape [tensors, ndim]."""
    return np.array([(*shape, *(1,) * (ndim - len(shape))) for shape in shapes], np.int64).reshape(len(shapes), ndim)


@dataclass(frozen=True, slots=True, eq=False)
class Boxes:
    """Box i has the bounds [start[at[i] : at[i + 1]], stop[at[i] : at[i + 1]]), one pair a dimension.

    `at` has one item more than there are boxes and begins with 0. Whether bounds make sense is not asked.
    """

    at: Ints
    start: Ints
    stop: Ints

    @classmethod
    def of(cls, regions: Sequence[Region]) -> Boxes:
        """Raises LayoutError for a bound over 64 bits."""
        at = np.zeros(len(regions) + 1, np.int64)
        np.cumsum([region.ndim for region in regions], out=at[1:])
        start = ints(chain.from_iterable(region.start for region in regions))
        return cls(at, start, ints(chain.from_iterable(region.stop for region in regions)))

    @classmethod
    def cut(cls, start: Ints, stop: Ints, ndim: Ints) -> Boxes:
        """Of matrices of bounds, one row a box, the first `ndim[i]` columns of each row."""
        at = np.zeros(len(ndim) + 1, np.int64)
        np.cumsum(ndim, out=at[1:])
        if at[-1] == start.size:
            return cls(at, start.reshape(-1), stop.reshape(-1))
        kept = np.arange(start.shape[1]) < ndim[:, None]
        return cls(at, start[kept], stop[kept])

    @classmethod
    def joined(cls, parts: list[Boxes]) -> Boxes:
        """The boxes of all parts, in order. As `joined`, it empties the list."""
        rows, items = sum(map(len, parts)), sum(len(part.start) for part in parts)
        at, start, stop = np.zeros(rows + 1, np.int64), np.empty(items, np.int64), np.empty(items, np.int64)
        while parts:
            part = parts.pop()
            rows, end, items = rows - len(part), items, items - len(part.start)
            at[rows + 1 : rows + 1 + len(part)] = part.at[1:] + items
            start[items:end], stop[items:end] = part.start, part.stop
        return cls(at, start, stop)

    def __len__(self) -> int:
        return len(self.at) - 1

    @property
    def ndim(self) -> Ints:
        """The number of dimensions of each box."""
        return self.at[1:] - self.at[:-1]

    def region(self, row: int) -> Region:
        begin, end = int(self.at[row]), int(self.at[row + 1])
        return Region(tuple(self.start[begin:end].tolist()), tuple(self.stop[begin:end].tolist()))

    def part(self, begin: int, end: int) -> Boxes:
        """The boxes [begin, end), in place."""
        first, last = int(self.at[begin]), int(self.at[end])
        return Boxes(self.at[begin : end + 1] - first, self.start[first:last], self.stop[first:last])

    def shift(self, offset: Sequence[int]) -> Boxes:
        """Boxes of as many dimensions as `offset` has, each moved by it."""
        moves = np.tile(ints(offset), len(self))
        return Boxes(self.at, self.start + moves, self.stop + moves)

    def take(self, rows: Ints) -> Boxes:
        """These boxes, in this order."""
        count = self.at[rows + 1] - self.at[rows]
        items = spans(self.at[rows], count)
        at = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(count, out=at[1:])
        return Boxes(at, self.start[items], self.stop[items])

    def overlapping(self, wanted: Region) -> Ints:
        """The rows that share an element with `wanted`, which is not empty; all have as many dimensions."""
        start, stop = self.matrices(wanted.ndim)
        hit = np.ones(len(self), np.bool_)
        # NumPy is slow along short axes.
        for dim, (first, end) in enumerate(zip(wanted.start, wanted.stop, strict=True)):
            hit &= (start[:, dim] < end) & (stop[:, dim] > first)
        return np.flatnonzero(hit)

    def matrices(self, ndim: int) -> tuple[Ints, Ints]:
        """Starts and stops, each of shape [boxes, ndim]; a box of fewer dimensions has [0:1] behind its own."""
        if len(self.start) == len(self) * ndim and (self.at[1:] - self.at[:-1] == ndim).all():
            return self.start.reshape(len(self), ndim), self.stop.reshape(len(self), ndim)
        own = np.arange(ndim) < self.ndim[:, None]
        start, stop = np.zeros(own.shape, np.int64), np.ones(own.shape, np.int64)
        start[own], stop[own] = self.start, self.stop
        return start, stop


def chunks(at: Ints, opening: Bools) -> Iterable[tuple[int, int]]:
    """Row ranges of about MAX_ITEMS bounds each, cut only where `opening` is set; `at` as in Boxes."""
    edges = np.append(np.flatnonzero(opening), len(at) - 1)
    begin = 0
    while begin < len(at) - 1:
        within = np.searchsorted(at[edges], at[begin] + MAX_ITEMS, side="right") - 1
        end = max(int(edges[within]), int(edges[np.searchsorted(edges, begin, side="right")]))
        yield begin, end
        begin = end
