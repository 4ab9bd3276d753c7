"""What several ranks want is read by one of them: who reads what, and in which round it is passed on.

A pure function of what all ranks want, computed alike on each of them. Knows ranges of bytes, and neither storage nor
process group.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dscheck.errors import LayoutError
from dscheck.layout.flat import flat_range_boxes
from dscheck.load.needs import Need
from dscheck.manifest.dtypes import ITEMSIZE
from dscheck.manifest.keys import LARGEST
from dscheck.manifest.place import SMALL_ALIGNMENT

Table = NDArray[np.int64]
"""Rows of file, start and stop: ranges, ascending and apart."""

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


def wanted(needs: Iterable[Need], block_bytes: int) -> list[Range]:
    """What these needs take of the data files, ascending and apart, cut where every rank that wants it cuts it.

    Ranges are joined where nothing but alignment lies between them.
    """
    piece = max(PIECE_BYTES // block_bytes, 1) * block_bytes
    found: list[Range] = []
    for need in sorted(needs, key=lambda need: (need.fragment.writer, *need.extent(block_bytes))):
        offset, (start, stop) = need.fragment.offset, need.extent(block_bytes)
        while start < stop:
            end = min(stop, offset + ((start - offset) // piece + 1) * piece)
            _append(found, Range(need.fragment.writer, start, end), cut=(start - offset) % piece == 0)
            start = end
    return found


def _append(found: list[Range], new: Range, cut: bool) -> None:
    """Add `new`, or join it to the last range; `cut`: a fragment or a piece of one begins there."""
    last = found[-1] if found else None
    if last is None or last.file != new.file or new.start >= last.stop + SMALL_ALIGNMENT:
        found.append(new)
        return
    far = last.start // PIECE_BYTES != new.start // PIECE_BYTES
    if cut and far and new.start >= last.stop:
        found.append(new)
    elif new.stop > last.stop:
        found[-1] = Range(last.file, last.start, new.stop)


def clipped(need: Need, range_: Range, block_bytes: int) -> Iterator[Need]:
    """What of `need` lies in these whole blocks of its data file. A block holds whole elements."""
    offset, (start, stop) = need.fragment.offset, need.extent(block_bytes)
    if range_.start <= start and stop <= range_.stop:
        yield need
        return
    first = max(need.first, (range_.start - offset) // block_bytes)
    last = min(need.last, -((offset - range_.stop) // block_bytes))
    if first >= last:
        return
    itemsize, outer = ITEMSIZE[need.row.dtype], need.fragment.region
    stop = min(last * block_bytes, need.fragment.nbytes)
    for box in flat_range_boxes(outer.shape, first * block_bytes // itemsize, stop // itemsize):
        inner = box.shift(outer.start).intersect(need.box)
        if inner is not None:
            yield replace(need, box=inner, first=first, last=last)


def divided(
    needs: Iterable[Need], ranges: Sequence[Range], block_bytes: int
) -> tuple[list[Need], dict[Range, list[Need]]]:
    """`needs` cut into what lies in none of `ranges` (ascending, apart), and what lies in each of them."""
    private: list[Need] = []
    parts: dict[Range, list[Need]] = {range_: [] for range_ in ranges}
    for need in needs:
        file, (start, stop) = need.fragment.writer, need.extent(block_bytes)
        number = bisect_right(ranges, (file, start), key=lambda r: (r.file, r.stop))
        while start < stop:
            shared = ranges[number] if number < len(ranges) and ranges[number].file == file else None
            if shared is None or shared.start > start:
                end = stop if shared is None else min(stop, shared.start)
                private.extend(clipped(need, Range(file, start, end), block_bytes))
            else:
                end = min(stop, shared.stop)
                parts[shared].extend(clipped(need, shared, block_bytes))
                number += 1
            start = end
    return private, parts


def encode(ranges: Sequence[Range]) -> bytes:
    """Ranges as compressed differences: a few bytes each."""
    table = np.array([(r.file, r.start, r.stop) for r in ranges], "<i8").reshape(-1, 3)
    return zlib.compress(np.diff(table, axis=0, prepend=np.zeros((1, 3), "<i8")).T.tobytes(), 1)


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
    rows = np.concatenate([np.empty((0, 3), np.int64), *wants])
    files = np.unique(rows[:, 0])
    ends = np.zeros(len(files), np.int64)
    np.maximum.at(ends, np.searchsorted(files, rows[:, 0]), rows[:, 2])
    if sum(map(int, ends)) > LARGEST:
        raise LayoutError("the data files have more than 2**63 bytes together")
    bases = np.cumsum(ends) - ends  # the files as one, each behind the other

    def places(table: Table, column: int) -> NDArray[np.int64]:
        return bases[np.searchsorted(files, table[:, 0])] + table[:, column]

    cuts = np.unique(np.concatenate([places(rows, 1), places(rows, 2)]))
    changes = np.zeros(len(cuts), np.int64)
    np.add.at(changes, np.searchsorted(cuts, places(rows, 1)), 1)
    np.add.at(changes, np.searchsorted(cuts, places(rows, 2)), -1)
    several = np.flatnonzero(np.cumsum(changes) > 1)
    starts, stops = cuts[several], cuts[several + 1]
    owners = np.searchsorted(bases, starts, side="right") - 1
    segments = np.stack([files[owners], starts - bases[owners], stops - bases[owners]], axis=1)
    covers = []
    for table in wants:
        before = np.searchsorted(places(table, 1), starts, side="right") - 1
        reach = np.append(places(table, 2), 0)[before]  # before the first: -1, which finds the 0
        covers.append(reach >= stops)
    return segments, covers


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
