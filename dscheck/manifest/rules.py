"""What the fragments of a plan must agree with, checked column by column: a plan has up to millions of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dscheck.errors import LayoutError
from dscheck.layout.region import Region
from dscheck.manifest.place import LARGE_ALIGNMENT, LARGE_BYTES, SMALL_ALIGNMENT

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class _Row(Protocol):
    """A fragment, as plan.py has it."""

    @property
    def tensor(self) -> int: ...
    @property
    def region(self) -> Region: ...
    @property
    def writer(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def first_block(self) -> int: ...
    @property
    def holders(self) -> int: ...


class Ragged:
    """Rows of different length, flat: row i is `items[begin[i] : begin[i] + length[i]]`."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self.length = ints([len(row) for row in rows])
        self.items = ints(list(chain.from_iterable(rows)))
        self.begin = np.cumsum(self.length) - self.length

    def take(self, rows: Ints) -> Ints:
        """The items of these rows, one after another."""
        length = self.length[rows]
        ends = np.cumsum(length)
        within = np.arange(int(length.sum())) + np.repeat(self.begin[rows] - ends + length, length)
        return self.items[within].astype(np.int64, copy=False)


def ints(values: Sequence[int]) -> Ints:
    """Raises LayoutError for a number over 64 bits."""
    try:
        return np.array(values, np.int64)
    except OverflowError as error:
        raise LayoutError("a number of the plan exceeds 64 bits") from error


def check_fragments(
    fragments: Sequence[_Row],
    shapes: Sequence[Sequence[int]],
    itemsizes: Sequence[int],
    holders: Sequence[Sequence[int]],
    block_bytes: int,
    at: Callable[[int], str],
) -> None:
    """Raises LayoutError, in which `at` names the row, unless every fragment agrees with its tensor and its neighbours.

    Tensors, whose bytes fit an int64, and holder sets, ascending, are known to be right.
    """
    rules = _Rules(fragments, at)
    rules.check_references(len(shapes), holders)
    rules.check_regions(Ragged(shapes), ints(itemsizes))
    rules.check_order()
    rules.check_files(block_bytes)


class _Rules:
    def __init__(self, fragments: Sequence[_Row], at: Callable[[int], str]) -> None:
        self._at = at
        self._tensor = ints([f.tensor for f in fragments])
        self._start = Ragged([f.region.start for f in fragments])
        self._stop = ints(list(chain.from_iterable(f.region.stop for f in fragments)))
        self._writer = ints([f.writer for f in fragments])
        self._offset = ints([f.offset for f in fragments])
        self._nbytes = ints([f.nbytes for f in fragments])
        self._first_block = ints([f.first_block for f in fragments])
        self._holders = ints([f.holders for f in fragments])

    def check_references(self, tensors: int, holders: Sequence[Sequence[int]]) -> None:
        self._refuse((self._tensor < 0) | (self._tensor >= tensors), "names no tensor of the plan", self._tensor)
        self._refuse((self._holders < 0) | (self._holders >= len(holders)), "names no holder set", self._holders)
        sets = Ragged(holders)
        ranks = int(sets.items.max(initial=0)) + 1
        # Sets are ascending, so (set, rank) pairs are too.
        pairs = np.repeat(np.arange(len(holders)), sets.length) * ranks + sets.items
        known = (self._writer >= 0) & (self._writer < ranks)
        wanted = self._holders * ranks + np.where(known, self._writer, 0)
        found = np.searchsorted(pairs, wanted)
        held = known & (found < len(pairs)) & (pairs.take(found, mode="clip") == wanted if len(pairs) else False)
        self._refuse(~held, "is written by a rank that does not hold it", self._writer)

    def check_regions(self, shapes: Ragged, itemsizes: Ints) -> None:
        ndim, start, stop = self._start.length, self._start.items, self._stop
        self._refuse(ndim != shapes.length[self._tensor], "has not the dimensions of its tensor", ndim)
        outside = (start >= stop) | (stop > shapes.take(self._tensor))
        self._refuse(self._any_of_row(outside), "is empty, or lies outside its tensor", ndim)
        numel = np.ones(len(ndim), np.int64)
        rows = np.flatnonzero(ndim)
        if len(rows):
            numel[rows] = np.multiply.reduceat(stop - start, self._start.begin[rows])
        expected = numel * itemsizes[self._tensor]
        self._refuse(self._nbytes != expected, "has not the bytes of its region", self._nbytes)

    def check_order(self) -> None:
        """By tensor, then start."""
        step = np.diff(self._tensor, prepend=-1)
        self._refuse(step < 0, "is out of order", self._tensor)
        later = step > 0
        undecided = np.flatnonzero(~later)
        begin, items = self._start.begin, self._start.items
        for dim in range(int(self._start.length.max(initial=0))):
            undecided = undecided[self._start.length[undecided] > dim]
            change = items[begin[undecided] + dim] - items[begin[undecided - 1] + dim]
            later[undecided[change > 0]] = True
            undecided = undecided[change == 0]
        self._refuse(~later, "is out of order, or begins where the one before it does", self._tensor)

    def check_files(self, block_bytes: int) -> None:
        """In each data file fragments are aligned and disjoint, and blocks are counted in the order of offsets."""
        alignment = np.where(self._nbytes >= LARGE_BYTES, LARGE_ALIGNMENT, SMALL_ALIGNMENT)
        unplaced = (self._offset < 0) | (self._offset % alignment != 0) | (self._offset + self._nbytes < 0)
        self._refuse(unplaced, "has an offset that is not aligned, or impossible", self._offset)
        order = np.lexsort((self._offset, self._writer))
        writer, offset, nbytes = self._writer[order], self._offset[order], self._nbytes[order]
        opens = np.diff(writer, prepend=-1) != 0
        overlaps = np.zeros(len(order), np.bool_)
        overlaps[1:] = ~opens[1:] & (offset[1:] < offset[:-1] + nbytes[:-1])
        self._refuse(overlaps, "overlaps another one in its data file, at offset", self._offset, order)
        blocks = -(-nbytes // block_bytes)
        before = np.cumsum(blocks) - blocks
        expected = before - np.repeat(before[opens], np.diff(np.flatnonzero(np.append(opens, True))))
        self._refuse(self._first_block[order] != expected, "miscounts blocks: first block", self._first_block, order)

    def _any_of_row(self, items: Bools) -> Bools:
        rows = np.flatnonzero(self._start.length)
        found = np.zeros(len(self._start.length), np.bool_)
        if len(rows):
            found[rows] = np.logical_or.reduceat(items, self._start.begin[rows])
        return found

    def _refuse(self, wrong: NDArray[Any], what: str, values: Ints, order: Ints | None = None) -> None:
        if wrong.any():
            row = int(np.argmax(wrong))
            row = row if order is None else int(order[row])
            raise LayoutError(f"{self._at(row)} {what} ({values[row]})")
