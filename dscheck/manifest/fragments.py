"""The fragments of a plan as columns: an object is made only for the row that somebody asks for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray

from dscheck.errors import LayoutError
from dscheck.layout.boxes import Boxes, Int32s, Ints, joined
from dscheck.layout.region import Region


@dataclass(frozen=True, slots=True)
class Fragment:
    """The bytes of one non-empty region as stored: `nbytes` before any codec, at `offset` of rank `writer`'s data file.

    `tensor` and `holders` are indices into the plan's tensors and holder sets. Its blocks are those of the writer's
    file from `first_block` on.
    """

    tensor: int
    region: Region
    writer: int
    offset: int
    nbytes: int
    first_block: int
    holders: int


@dataclass(frozen=True, slots=True, eq=False)
class Fragments(Sequence[Fragment]):
    """Rows of Fragment, column by column: `boxes` are the regions, the other columns have one number a row.

    A slice shares the memory of the whole.
    """

    tensor: Int32s
    boxes: Boxes
    writer: Int32s
    offset: Ints
    nbytes: Ints
    first_block: Ints
    holders: Int32s

    @classmethod
    def of(cls, rows: Iterable[Fragment]) -> Fragments:
        """Raises LayoutError for a number that does not fit its column."""
        rows = list(rows)
        return cls(
            _column([row.tensor for row in rows], np.int32),
            Boxes.of([row.region for row in rows]),
            _column([row.writer for row in rows], np.int32),
            _column([row.offset for row in rows], np.int64),
            _column([row.nbytes for row in rows], np.int64),
            _column([row.first_block for row in rows], np.int64),
            _column([row.holders for row in rows], np.int32),
        )

    @classmethod
    def joined(cls, parts: list[Fragments]) -> Fragments:
        """The rows of all parts, in order. Empties the list."""
        if len(parts) == 1:
            return parts.pop()
        columns = [list(column) for column in zip(*(part._numbers() for part in parts), strict=True)] or [[]] * 6
        boxes = [part.boxes for part in parts]
        parts.clear()
        tensor, writer, offset, nbytes, first_block, holders = columns
        return cls(
            joined(tensor, np.int32),
            Boxes.joined(boxes),
            joined(writer, np.int32),
            joined(offset, np.int64),
            joined(nbytes, np.int64),
            joined(first_block, np.int64),
            joined(holders, np.int32),
        )

    def __len__(self) -> int:
        return len(self.tensor)

    @overload
    def __getitem__(self, row: int) -> Fragment: ...
    @overload
    def __getitem__(self, row: slice) -> Fragments: ...
    def __getitem__(self, row: int | slice) -> Fragment | Fragments:
        if isinstance(row, slice):
            begin, end, step = row.indices(len(self))
            if step != 1:
                return self.take(np.arange(begin, end, step))
            return self._each(self.boxes.part(begin, max(begin, end)), slice(begin, end))
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} fragments")
        row %= len(self)
        numbers = [int(column[row]) for column in self._numbers()]
        return Fragment(numbers[0], self.boxes.region(row), *numbers[1:])

    def __iter__(self) -> Iterator[Fragment]:
        tensor, *others = (column.tolist() for column in self._numbers())
        regions = map(self.boxes.region, range(len(self)))
        return map(Fragment, tensor, regions, *others)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Fragments):
            return NotImplemented
        mine = (*self._numbers(), self.boxes.at, self.boxes.start, self.boxes.stop)
        theirs = (*other._numbers(), other.boxes.at, other.boxes.start, other.boxes.stop)
        return all(np.array_equal(one, another) for one, another in zip(mine, theirs, strict=True))

    def take(self, rows: Ints) -> Fragments:
        """These rows, in this order."""
        return self._each(self.boxes.take(rows), rows)

    def rows_of(self, tensor: int) -> tuple[int, int]:
        """Where the rows of a tensor begin and end; they are in order."""
        if len(self) and self.tensor[0] == tensor == self.tensor[-1]:
            return 0, len(self)
        begin, end = np.searchsorted(self.tensor, np.array([tensor, tensor + 1], np.int32))
        return int(begin), int(end)

    def overlapping(self, tensor: int, wanted: Region) -> Ints:
        """The rows of a tensor that share an element with `wanted`, a region of as many dimensions; by number."""
        begin, end = self.rows_of(tensor)
        if begin == end or not wanted.numel:
            return np.empty(0, np.int64)
        boxes = self.boxes if end - begin == len(self) else self.boxes.part(begin, end)
        return begin + boxes.overlapping(wanted)

    def _numbers(self) -> list[NDArray[Any]]:
        return [self.tensor, self.writer, self.offset, self.nbytes, self.first_block, self.holders]

    def _each(self, boxes: Boxes, rows: slice | Ints) -> Fragments:
        tensor, *others = (column[rows] for column in self._numbers())
        return Fragments(tensor, boxes, *others)


def _column(values: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
    try:
        return np.array(values, dtype)
    except OverflowError as error:
        raise LayoutError(f"a number of the plan exceeds {np.dtype(dtype).itemsize * 8} bits") from error
