"""What several ranks want is read by one of them: who reads what, and in which round it is passed on.

A pure function of what all ranks want, computed alike on each of them. Knows ranges of bytes, and neither storage nor
process group.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dscheck.layout.boxes import Bools, Boxes, Ints, opens, spans
from dscheck.layout.flat import flat_range_boxes
from dscheck.load.needs import Needs
from dscheck.load.reads import Line, Reads, Table
from dscheck.manifest.dtypes import ITEMSIZE
from dscheck.manifest.place import SMALL_ALIGNMENT

PIECE_BYTES = 8 << 20
"""What is wanted is cut here, so that no more than twice as much is read, or passed on, at a time."""

READ_BYTES_A_ROUND, READS_A_ROUND = 16 << 20, 4
"""What one rank reads for others in a round, unless a single piece is longer."""

RECEIVED_BYTES_A_ROUND = 64 << 20
"""What one rank is sent in a round, unless a single piece is longer: the memory that it needs for it."""


@dataclass(frozen=True, slots=True, order=True)
class Range:
    """Bytes [start, stop) of the data file of saved rank `file`: whole blocks, and what aligns them."""

    file: int
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Shared:
    """A range that `reader` reads in `round` and sends to the other `members`, who are ascending, as it is among."""

    range: Range
    reader: int
    members: tuple[int, ...]
    round: int


def wanted(needs: Needs) -> Table:
    """What these needs take of the data files, cut where every rank that wants it cuts it.

    Ranges are joined where nothing but alignment lies between them.
    """
    file, start, stop, opening = _pieces(needs)
    if not len(file):
        return table_of([])
    line = Line(file, stop)
    place, reached = line.at(file, start), np.maximum.accumulate(line.at(file, stop))
    before = np.append(0, reached[:-1])
    apart = opens(file) | (place >= before + SMALL_ALIGNMENT)
    # Where a piece begins there may be a cut: at the first such place of each PIECE_BYTES of the file.
    places = np.flatnonzero(apart | (opening & (place >= before)))
    begin = places[apart[places] | opens(start[places] // PIECE_BYTES)]
    return np.stack([file[begin], start[begin], np.maximum.reduceat(stop, begin)], axis=1)


def _pieces(needs: Needs) -> tuple[Ints, Ints, Ints, Bools]:
    """Needs cut at each PIECE_BYTES of their fragments: file, start and stop, ascending, and whether a piece begins
    there.
    """
    block_bytes = needs.source.block_bytes
    piece = max(PIECE_BYTES // block_bytes, 1) * block_bytes
    file, (start, stop) = needs.file, needs.extents()
    offset = needs.source.rows.offset[needs.fragment]
    first = (start - offset) // piece
    count = -(-(stop - offset) // piece) - first
    number, row = spans(first, count), np.repeat(np.arange(len(needs)), count)
    begin = np.maximum(start[row], offset[row] + number * piece)
    end = np.minimum(stop[row], offset[row] + (number + 1) * piece)
    order = np.lexsort((end, begin, file[row]))
    row, begin = row[order], begin[order]
    return file[row], begin, end[order], (begin - offset[row]) % piece == 0


def divided(needs: Needs, ranges: Table) -> tuple[Needs, Reads]:
    """`needs` cut into what lies in none of `ranges`, and one read for each of these with what lies in it."""
    file, (start, stop) = needs.file, needs.extents()
    line = Line(np.append(file, ranges[:, 0]), np.append(stop, ranges[:, 2]))
    low, high = (line.at(ranges[:, 0], ranges[:, column]) for column in (1, 2))
    first = np.searchsorted(high, line.at(file, start), side="right")
    behind = np.searchsorted(low, line.at(file, stop))
    inside = behind - first == 1
    inside[inside] &= (ranges[first[inside], 1] <= start[inside]) & (stop[inside] <= ranges[first[inside], 2])
    private, parts = [needs.take(np.flatnonzero(behind == first))], [needs.take(np.flatnonzero(inside))]
    owners = [first[inside]]
    for row in np.flatnonzero((behind > first) & ~inside).tolist():
        need, at, end = needs[row : row + 1], int(start[row]), int(stop[row])
        for number in range(int(first[row]), int(behind[row])):
            _, begin, until = ranges[number].tolist()
            if at < begin:
                private.append(clipped(need, at, begin))
            parts.append(clipped(need, max(at, begin), min(end, until)))
            owners.append(np.full(len(parts[-1]), number))
            at = until
        if at < end:
            private.append(clipped(need, at, end))
    owner = np.concatenate(owners)
    order = np.argsort(owner, kind="stable")
    edges = np.searchsorted(owner[order], np.arange(len(ranges) + 1))
    within = Needs.joined(parts).take(order)
    return Needs.joined(private), Reads(within, ranges[:, 0], ranges[:, 1], ranges[:, 2], edges[:-1], edges[1:])


def clipped(need: Needs, start: int, stop: int) -> Needs:
    """What of one need lies in the whole blocks at [start, stop) of its data file. A block holds whole elements."""
    (one,), block_bytes = need, need.source.block_bytes
    first = max(one.first, (start - one.fragment.offset) // block_bytes)
    last = min(one.last, -((one.fragment.offset - stop) // block_bytes))
    if first >= last:
        return need[:0]
    itemsize, outer = ITEMSIZE[one.row.dtype], one.fragment.region
    end = min(last * block_bytes, one.fragment.nbytes) // itemsize
    boxes = [box.shift(outer.start) for box in flat_range_boxes(outer.shape, first * block_bytes // itemsize, end)]
    inner = Boxes.of([inner for box in boxes if (inner := box.intersect(one.box)) is not None])
    low, high = inner.matrices(need.start.shape[1])
    count = len(inner)
    return Needs(need.source, np.repeat(need.fragment, count), low, high, np.full(count, first), np.full(count, last))


def table_of(ranges: Iterable[Range]) -> Table:
    """Ranges as rows."""
    return np.array([(range_.file, range_.start, range_.stop) for range_ in ranges], np.int64).reshape(-1, 3)


def encode(table: Table) -> bytes:
    """Ranges as compressed differences: a few bytes each."""
    return zlib.compress(np.diff(table.astype("<i8"), axis=0, prepend=np.zeros((1, 3), "<i8")).T.tobytes(), 1)


def decode(data: bytes) -> Table:
    """What `encode` was given, as rows of file, start and stop."""
    return np.cumsum(np.frombuffer(zlib.decompress(data), "<i8").reshape(3, -1).T, axis=0)


def schedule(wants: Sequence[Table]) -> list[Shared]:
    """Who reads each range that more than one rank wants, and when; `wants` has the ranges of each rank.

    The ranks that want a range take turns, so that all read about as many bytes, private ones included. A round is
    bounded in what a rank reads and is sent, not in time. Ordered by round for each reader.
    """
    segments, covers = _shared(wants)
    nbytes = segments[:, 2] - segments[:, 1]
    loads = [
        int((table[:, 2] - table[:, 1]).sum() - nbytes[cover].sum()) for table, cover in zip(wants, covers, strict=True)
    ]
    sets = np.packbits(np.array(covers, bool).reshape(len(wants), len(segments)), axis=0).T
    known: dict[bytes, tuple[int, ...]] = {}
    rounds = _Rounds(len(wants))
    found = []
    for number, (row, members_bits) in enumerate(zip(segments.tolist(), map(bytes, sets), strict=True)):
        if members_bits not in known:
            known[members_bits] = tuple(rank for rank, cover in enumerate(covers) if cover[number])
        range_, members = Range(*row), known[members_bits]
        reader = min(members, key=lambda member: (loads[member], member))
        loads[reader] += range_.nbytes
        found.append(Shared(range_, reader, members, rounds.place(range_.nbytes, reader, members)))
    return found


def _shared(wants: Sequence[Table]) -> tuple[Table, list[NDArray[np.bool_]]]:
    """The ranges that the same several ranks want, ascending, and of each rank which of them it wants."""
    rows = np.concatenate([table_of([]), *wants])
    line = Line(rows[:, 0], rows[:, 2])
    places = [(line.at(table[:, 0], table[:, 1]), line.at(table[:, 0], table[:, 2])) for table in wants]
    begin, end = line.at(rows[:, 0], rows[:, 1]), line.at(rows[:, 0], rows[:, 2])
    cuts = np.unique(np.concatenate([begin, end]))
    changes = np.zeros(len(cuts), np.int64)
    np.add.at(changes, np.searchsorted(cuts, begin), 1)
    np.add.at(changes, np.searchsorted(cuts, end), -1)
    several = np.flatnonzero(np.cumsum(changes) > 1)
    starts, stops = cuts[several], cuts[several + 1]
    covers = []
    for low, high in places:
        before = np.searchsorted(low, starts, side="right") - 1
        reach = np.append(high, 0)[before]  # before the first: -1, which finds the 0
        covers.append(reach >= stops)
    return line.ranges(starts, stops), covers


class _Rounds:
    """How full the latest round of each rank is."""

    def __init__(self, ranks: int) -> None:
        self._round = [0] * ranks
        self._read = [(0, 0)] * ranks
        self._received = [0] * ranks

    def place(self, nbytes: int, reader: int, members: Sequence[int]) -> int:
        """The first round in which all of `members` can pass on one range more."""
        number = max(self._round[member] for member in members)
        if not all(self._has_room(member, number, nbytes, member == reader) for member in members):
            number += 1
        for member in members:
            if self._round[member] < number:
                self._round[member], self._read[member], self._received[member] = number, (0, 0), 0
            if member == reader:
                reads, read = self._read[member]
                self._read[member] = reads + 1, read + nbytes
            else:
                self._received[member] += nbytes
        return number

    def _has_room(self, member: int, number: int, nbytes: int, reads: bool) -> bool:
        if self._round[member] < number:
            return True
        if not reads:
            return not self._received[member] or self._received[member] + nbytes <= RECEIVED_BYTES_A_ROUND
        count, read = self._read[member]
        return not count or (count < READS_A_ROUND and read + nbytes <= READ_BYTES_A_ROUND)
