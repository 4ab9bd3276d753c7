"""What the fragments of a plan must agree with, checked column by column: a plan has up to millions of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dscheck.errors import LayoutError
from dscheck.layout.boxes import MAX_ITEMS, Ints, ints, opens, padded
from dscheck.manifest.dtypes import ITEMSIZE
from dscheck.manifest.fragments import Fragments
from dscheck.manifest.place import alignment_of, block_count, by_file, some_files


class _Tensor(Protocol):
    """A row of the tensors, as plan.py has it."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


class FragmentRules:
    """What fragments must agree with: tensors, whose bytes fit an int64, and ascending holder sets, known to be right.

    Refusals are LayoutErrors that name the fragment.
    """

    def __init__(self, tensors: Sequence[_Tensor], holders: Sequence[Sequence[int]], block_bytes: int) -> None:
        self._tensors, self._sets, self._block_bytes = tensors, len(holders), block_bytes
        self._ndim = ints(len(tensor.shape) for tensor in tensors)
        self._most = int(self._ndim.max(initial=0))
        self._shapes = padded([tensor.shape for tensor in tensors], self._most)
        self._itemsizes = ints(ITEMSIZE[tensor.dtype] for tensor in tensors)
        members = ints(chain.from_iterable(holders))
        self._ranks = int(members.max(initial=0)) + 1
        # Sets are ascending, so (set, rank) pairs are too.
        self._pairs = np.repeat(np.arange(len(holders)), ints(map(len, holders))) * self._ranks + members

    def check(self, rows: Fragments) -> None:
        """Each row agrees with its tensor, its holders and the row before it."""
        for part in self._parts(rows, before=1):
            self._check_row(part)
            self._check_order(part)

    def check_each(self, rows: Fragments) -> None:
        """Each row agrees with its tensor and its holders, whatever others there are."""
        for part in self._parts(rows, before=0):
            self._check_row(part)

    def _parts(self, rows: Fragments, before: int) -> Iterator[Fragments]:
        step = max(1, MAX_ITEMS // max(1, self._most))
        return (rows[max(0, begin - before) : begin + step] for begin in range(0, len(rows), step))

    def _check_row(self, rows: Fragments) -> None:
        self._check_references(rows)
        self._check_regions(rows)
        self._check_offsets(rows)

    def check_files(self, rows: Fragments) -> None:
        """In each data file fragments are disjoint, and blocks are counted in the order of offsets. Needs all rows."""
        for order in some_files(rows.writer, by_file(rows.writer)):
            self._check_some_files(rows, order)

    def _check_some_files(self, rows: Fragments, order: Ints) -> None:
        writer, offset = rows.writer[order], rows.offset[order]
        same = ~opens(writer)
        if (same[1:] & (offset[1:] < offset[:-1])).any():  # files may be in another order than the plan
            order = order[np.lexsort((offset, writer))]
            offset = rows.offset[order]
        nbytes = rows.nbytes[order]
        overlaps = np.zeros(len(order), np.bool_)
        overlaps[1:] = same[1:] & (offset[1:] < offset[:-1] + nbytes[:-1])
        self._refuse(rows, overlaps, "overlaps another one in its data file, at offset", rows.offset, order)
        blocks = block_count(nbytes, self._block_bytes)
        before = np.cumsum(blocks) - blocks
        expected = before - np.repeat(before[~same], np.diff(np.flatnonzero(np.append(~same, True))))
        first = rows.first_block
        self._refuse(rows, first[order] != expected, "miscounts blocks: first block", first, order)

    def _check_references(self, rows: Fragments) -> None:
        tensor, writer, held = rows.tensor, rows.writer, rows.holders
        self._refuse(rows, (tensor < 0) | (tensor >= len(self._tensors)), "names no tensor of the plan", tensor)
        self._refuse(rows, (held < 0) | (held >= self._sets), "names no holder set", held)
        known = (writer >= 0) & (writer < self._ranks)
        wanted = held.astype(np.int64) * self._ranks + np.where(known, writer, 0)
        found = np.searchsorted(self._pairs, wanted)
        holds = known & (found < len(self._pairs))
        holds[holds] = self._pairs[found[holds]] == wanted[holds]
        self._refuse(rows, ~holds, "is written by a rank that does not hold it", writer)

    def _check_regions(self, rows: Fragments) -> None:
        ndim = rows.boxes.ndim
        self._refuse(rows, ndim != self._ndim[rows.tensor], "has not the dimensions of its tensor", ndim)
        start, stop = rows.boxes.matrices(self._most)
        wrong = (start < 0) | (start >= stop) | (stop > self._shapes[rows.tensor])
        outside = np.logical_or.reduce(wrong, axis=1)
        self._refuse(rows, outside, "is empty, or lies outside its tensor", ndim)
        expected = (stop - start).prod(axis=1) * self._itemsizes[rows.tensor]
        self._refuse(rows, rows.nbytes != expected, "has not the bytes of its region", rows.nbytes)

    def _check_order(self, rows: Fragments) -> None:
        """By tensor, then start."""
        step = np.diff(rows.tensor, prepend=rows.tensor[:1] - 1)
        self._refuse(rows, step < 0, "is out of order", rows.tensor)
        start, _ = rows.boxes.matrices(self._most)
        later, undecided = step > 0, step == 0
        for dim in range(self._most):
            change = np.diff(start[:, dim], prepend=start[:1, dim])
            later |= undecided & (change > 0)
            undecided &= change == 0
        self._refuse(rows, ~later, "is out of order, or begins where the one before it does", rows.tensor)

    def _check_offsets(self, rows: Fragments) -> None:
        offset, nbytes = rows.offset, rows.nbytes
        unplaced = (offset < 0) | (offset % alignment_of(nbytes) != 0) | (offset + nbytes < 0)
        self._refuse(rows, unplaced, "has an offset that is not aligned, or impossible", offset)

    def _refuse(
        self, rows: Fragments, wrong: NDArray[Any], what: str, values: NDArray[Any], order: Ints | None = None
    ) -> None:
        if wrong.any():
            at = int(np.argmax(wrong))
            at = at if order is None else int(order[at])
            tensor = int(rows.tensor[at])
            name = self._tensors[tensor].name if 0 <= tensor < len(self._tensors) else tensor
            bounds = rows.boxes.part(at, at + 1)
            box = ", ".join(f"{a}:{b}" for a, b in zip(bounds.start.tolist(), bounds.stop.tolist(), strict=True))
            raise LayoutError(f"fragment '{name}' [{box}] {what} ({values[at]})")
