"""The head of a stored plan: all of it but the fragments, and in which batches these lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dscheck.errors import LayoutError
from dscheck.layout.boxes import Bools, Boxes, Int32s, Ints, ints, padded, spans
from dscheck.layout.region import Region
from dscheck.manifest.fragments import Fragments
from dscheck.manifest.place import block_count
from dscheck.manifest.plan import RankRow, TensorRow, check_head
from dscheck.manifest.rules import FragmentRules

BATCH_ROWS = 1024
"""A rank wants a few fragments of each of thousands of tensors, and reads the batches that hold them: smaller ones
compress worse and make the head longer, larger ones are decoded in vain (docs/scale.md)."""

MAX_BATCH_ROWS = 1 << 16
MAX_BATCH_BYTES = 1 << 27
"""More than so many rows of 64 dimensions need; what a directory claims to be larger is not read."""


@dataclass(frozen=True, slots=True, eq=False)
class Directory:
    """Where the fragments are, batch by batch: `size` bytes at `offset` behind the head, with SHA-256 `sha256`.

    Batch i has `rows` fragments of the tensors from `first` to `last`: all of each, or a part of one. Then hulls[i] is
    the smallest box around its regions, else empty, without dimensions.
    """

    offset: Ints
    size: Ints
    rows: Ints
    first: Ints
    last: Ints
    hulls: Boxes
    sha256: tuple[bytes, ...]

    def __len__(self) -> int:
        return len(self.offset)

    @property
    def nbytes(self) -> int:
        """Of all batches."""
        return int(self.size.sum())

    def find(self, tensor: int) -> list[int]:
        """The batches that hold fragments of a tensor."""
        return list(range(int(np.searchsorted(self.last, tensor)), int(np.searchsorted(self.first, tensor, "right"))))

    def find_each(self, wanted: Sequence[tuple[int, Region]]) -> tuple[Ints, Ints]:
        """The batches that may hold fragments of tensors which overlap these regions, ascending, and for each the
        number of the region that it was found for: pairs, each once.
        """
        tensor = ints(tensor for tensor, _ in wanted)
        regions = Boxes.of([region for _, region in wanted])
        low, high = regions.matrices(max((region.ndim for _, region in wanted), default=0))
        begin = np.searchsorted(self.last, tensor)
        count = np.searchsorted(self.first, tensor, side="right") - begin
        batch, want = spans(begin, count), np.repeat(np.arange(len(wanted)), count)
        hit: Bools = np.logical_and.reduce(low < high, axis=1)[want]
        split = np.flatnonzero(hit & (count > 1)[want])
        start, stop = self.hulls.take(batch[split]).matrices(low.shape[1])
        hit[split] = ((start < high[want[split]]) & (stop > low[want[split]])).all(axis=1)
        batch, want = batch[hit], want[hit]
        order = np.argsort(batch, kind="stable")
        return batch[order], want[order]

    def validate(self, shapes: Sequence[Sequence[int]]) -> None:
        """Raises LayoutError unless batches follow each other and agree with the tensors' shapes."""
        ends = np.cumsum(self.size)
        wrong = (
            (self.size <= 0)
            | (self.size > MAX_BATCH_BYTES)
            | (self.rows < 1)
            | (self.rows > MAX_BATCH_ROWS)
            | (self.offset != ends - self.size)
        )
        wrong |= (self.first < 0) | (self.first > self.last) | (self.last >= len(shapes))
        wrong[1:] |= self.first[1:] < self.last[:-1]
        if wrong.any():
            raise LayoutError(f"batch {int(np.argmax(wrong))} of the fragments has impossible bounds")
        split = np.zeros(len(self), np.bool_)
        split[1:] = self.first[1:] == self.last[:-1]
        split[:-1] |= split[1:]
        lengths = np.array([len(shape) for shape in shapes], np.int64)
        ndim = np.where(split, lengths[self.first], 0)
        if (split & (self.first != self.last)).any() or (self.hulls.ndim != ndim).any():
            raise LayoutError("a batch with a part of a tensor has other tensors too, or no box around its fragments")
        start, stop = self.hulls.matrices(int(ndim.max(initial=0)))
        shape = padded([shapes[tensor] for tensor in self.first[split].tolist()], start.shape[1])
        start, stop = start[split], stop[split]
        if not ((start >= 0) & (start < stop) & (stop <= shape)).all():
            raise LayoutError("the box around the fragments of a batch leaves its tensor")


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """A plan without its fragments; `file_ends` as in Plan."""

    tensors: tuple[TensorRow, ...]
    ranks: tuple[RankRow, ...]
    holders: tuple[tuple[int, ...], ...]
    file_ends: tuple[tuple[int, int], ...]
    directory: Directory
    block_bytes: int

    def validate(self) -> None:
        """Raises LayoutError unless every row agrees with all others."""
        check_head(self.tensors, self.ranks, self.holders, self.block_bytes)
        if any(end < 0 or blocks < 0 for end, blocks in self.file_ends):
            raise LayoutError("a data file ends before it begins")
        self.directory.validate([tensor.shape for tensor in self.tensors])


class BatchRules:
    """What fragments of batches must agree with; refusals are LayoutErrors."""

    def __init__(self, head: Head) -> None:
        self._head = head
        self._rules = FragmentRules(head.tensors, head.holders, head.block_bytes)
        self._ends, self._blocks = np.array(head.file_ends, np.int64).reshape(-1, 2).T

    def check_bounds(self, number: int, rows: Fragments) -> None:
        """These begin and end with the tensors that the head says of its batch `number`."""
        directory = self._head.directory
        said = int(directory.first[number]), int(directory.last[number])
        found = int(rows.tensor[0]), int(rows.tensor[-1])
        if found != said:
            raise LayoutError(f"first and last tensor of batch {number} are {found}, by the head {said}")

    def check_rows(self, rows: Fragments) -> None:
        """Each of these is right, whichever they are."""
        self._rules.check_each(rows)
        blocks = rows.first_block + block_count(rows.nbytes, self._head.block_bytes)
        if ((rows.offset + rows.nbytes > self._ends[rows.writer]) | (blocks > self._blocks[rows.writer])).any():
            raise LayoutError("a fragment lies behind the end of its data file")

    def check_batch(self, number: int, rows: Fragments) -> None:
        """These are the rows of batch `number`, all of them and in order."""
        self.check_rows(rows)
        self._rules.check(rows)
        hull = self._head.directory.hulls.part(number, number + 1)
        if len(hull.start):
            start, stop = rows.boxes.matrices(len(hull.start))
            if not (np.array_equal(start.min(axis=0), hull.start) and np.array_equal(stop.max(axis=0), hull.stop)):
                raise LayoutError(f"the box around the fragments of batch {number} is not {hull.region(0)}")


def cut_into_batches(tensor: Int32s, most: int) -> Iterator[tuple[int, int]]:
    """Row ranges of at most `most` rows each: whole tensors, or equal parts of one that has more.

    >>> list(cut_into_batches(np.array([0, 0, 1, 2, 2, 2, 2, 2, 3], np.int32), 3))
    [(0, 3), (3, 5), (5, 8), (8, 9)]
    """
    begin = 0
    for at, end in pairwise(np.flatnonzero(np.diff(tensor, prepend=-1, append=-1)).tolist()):
        if end - begin <= most:
            continue
        if begin < at:
            yield begin, at
        begin, parts = at, -(-(end - at) // most)
        if parts > 1:
            yield from pairwise(at + (end - at) * part // parts for part in range(parts + 1))
            begin = end
    if begin < len(tensor):
        yield begin, len(tensor)
