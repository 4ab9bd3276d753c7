"""From needs to reads: byte ranges of data files, few and bounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from dscheck.errors import LayoutError
from dscheck.layout.boxes import Ints, opens
from dscheck.load.needs import READ_BYTES, Needs
from dscheck.manifest.keys import LARGEST

Table = NDArray[np.int64]
"""Rows of file, start and stop: ranges, ascending and apart."""

GAP_BYTES = 64 << 10
"""Ranges that lie closer than this are read as one: a request costs more than the bytes between."""


@dataclass(frozen=True, slots=True)
class Read:
    """Bytes [start, stop) of the data file of saved rank `file`, and all needs that they serve."""

    file: int
    start: int
    stop: int
    needs: Needs


@dataclass(frozen=True, slots=True, eq=False)
class Reads(Sequence[Read]):
    """Read by read, as columns: read i serves needs[begin[i] : end[i]]."""

    needs: Needs
    file: Ints
    start: Ints
    stop: Ints
    begin: Ints
    end: Ints

    @classmethod
    def joined(cls, first: Reads, second: Reads) -> Reads:
        """The reads of both, in order; needs of one source."""
        behind = len(first.needs)
        columns = zip(first._columns(), second._columns(), (0, 0, 0, behind, behind), strict=True)
        needs = Needs.joined([first.needs, second.needs])
        return cls(needs, *(np.concatenate([one, other + more]) for one, other, more in columns))

    def __len__(self) -> int:
        return len(self.file)

    @overload
    def __getitem__(self, row: int) -> Read: ...
    @overload
    def __getitem__(self, row: slice) -> Reads: ...
    def __getitem__(self, row: int | slice) -> Read | Reads:
        if isinstance(row, slice):
            return Reads(self.needs, *(column[row] for column in self._columns()))
        file, start, stop, begin, end = (int(column[row]) for column in self._columns())
        return Read(file, start, stop, self.needs[begin:end])

    def take(self, rows: Ints) -> Reads:
        """These reads, in this order."""
        return Reads(self.needs, *(column[rows] for column in self._columns()))

    @property
    def nbytes(self) -> int:
        return int((self.stop - self.start).sum())

    def _columns(self) -> tuple[Ints, ...]:
        return self.file, self.start, self.stop, self.begin, self.end


class Line:
    """Data files as if they lay one behind the other: a place in one of them is one number."""

    def __init__(self, file: Ints, stop: Ints) -> None:
        """Of places up to `stop` in each `file`. Raises LayoutError for more than 2**63 bytes together."""
        ends = np.zeros(int(file.max(initial=-1)) + 1, np.int64)
        np.maximum.at(ends, file, stop)
        if sum(map(int, ends)) > LARGEST:
            raise LayoutError("the data files have more than 2**63 bytes together")
        self._bases = np.cumsum(ends) - ends

    def at(self, file: Ints, place: Ints) -> Ints:
        found: Ints = self._bases[file] + place
        return found

    def ranges(self, start: Ints, stop: Ints) -> Table:
        """Ranges of the line, each of one file and not empty, as rows of file, start and stop."""
        file = np.searchsorted(self._bases, start, side="right") - 1
        return np.stack([file, start - self._bases[file], stop - self._bases[file]], axis=1)


def reads_of(needs: Needs) -> Reads:
    """Needs sorted by place and joined where the gap is small, each read at most READ_BYTES unless one need is
    longer. Raises LayoutError for files of more than 2**63 bytes together.
    """
    file, (start, stop) = needs.file, needs.extents()
    if not len(file):
        return Reads(needs, file, start, stop, file, file)
    order = np.lexsort((stop, start, file))
    needs, file, start, stop = needs.take(order), file[order], start[order], stop[order]
    line = Line(file, stop)
    reached = np.maximum.accumulate(line.at(file, stop))
    begin = np.flatnonzero(opens(file) | _far(line.at(file, start), reached))
    last = np.append(begin[1:], len(file)) - 1
    long = begin[reached[last] - line.at(file[begin], start[begin]) > READ_BYTES]
    ends = np.append(begin, len(file))[np.searchsorted(begin, long) + 1]
    cuts = [at + _cut(start[at:end], stop[at:end]) for at, end in zip(long.tolist(), ends.tolist(), strict=True)]
    begin = np.unique(np.concatenate([begin, *cuts]))
    return Reads(
        needs, file[begin], start[begin], np.maximum.reduceat(stop, begin), begin, np.append(begin[1:], len(file))
    )


def _far(start: Ints, reached: Ints) -> Ints:
    """Which rows begin more than GAP_BYTES behind those before them."""
    return np.append(False, start[1:] - reached[:-1] > GAP_BYTES)


def _cut(start: Ints, stop: Ints) -> Ints:
    """Where reads begin of rows that are too long for one: each as long as it may be."""
    found, at = [], 0
    while at < len(start):
        found.append(at)
        near = int(np.searchsorted(start, start[at] + READ_BYTES, side="right"))
        reached = np.maximum.accumulate(stop[at:near])
        ends = _far(start[at:near], reached) | (reached - start[at] > READ_BYTES)
        ends[0] = False
        at = at + int(np.argmax(ends)) if ends.any() else near
    return np.array(found, np.int64)
