"""What several ranks want is read by one of them: who reads what, and in which round it is passed on.

A pure function of what all ranks want, computed alike on each of them. Knows ranges of bytes, and neither storage nor
process group.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dscheck.layout.flat import flat_range_boxes
from dscheck.load.needs import Need
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


def decode(data: bytes) -> list[Range]:
    """What `encode` was given."""
    table = np.cumsum(np.frombuffer(zlib.decompress(data), "<i8").reshape(3, -1).T, axis=0)
    return [Range(*row) for row in table.tolist()]


def schedule(wants: Sequence[Sequence[Range]]) -> list[Shared]:
    """Who reads each range that more than one rank wants, and when; `wants` has the ranges of each rank.

    The ranks that want a range take turns, so that all read about as many bytes, private ones included. A round is
    bounded in what a rank reads and is sent, not in time. Ordered by round for each reader.
    """
    segments = list(_segments(wants))
    loads = [sum(r.nbytes for r in ranges) for ranges in wants]
    for range_, members in segments:
        for member in members:
            loads[member] -= range_.nbytes
    rounds = _Rounds(len(wants))
    found = []
    for range_, members in segments:
        reader = min(members, key=lambda member: (loads[member], member))
        loads[reader] += range_.nbytes
        found.append(Shared(range_, reader, members, rounds.place(range_.nbytes, reader, members)))
    return found


def _segments(wants: Sequence[Sequence[Range]]) -> Iterator[tuple[Range, tuple[int, ...]]]:
    """The ranges that the same ranks want, where these are several, ascending."""
    events: dict[tuple[int, int], int] = defaultdict(int)
    for rank, ranges in enumerate(wants):
        for r in ranges:
            events[r.file, r.start] ^= 1 << rank
            events[r.file, r.stop] ^= 1 << rank
    cuts = {(r.file, place) for ranges in wants for r in ranges for place in (r.start, r.stop)}
    known: dict[int, tuple[int, ...]] = {}
    mask, before = 0, (-1, 0)
    for place in sorted(cuts):
        if mask & (mask - 1):
            if mask not in known:
                known[mask] = tuple(rank for rank in range(len(wants)) if mask >> rank & 1)
            yield Range(before[0], before[1], place[1]), known[mask]
        mask, before = mask ^ events[place], place


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
