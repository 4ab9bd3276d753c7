"""The plan: which tensors a step has, in which fragments, who wrote each, where, and who held what."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np

from dscheck.errors import LayoutError
from dscheck.layout.boxes import Ints, chunks, ints, opens, padded
from dscheck.layout.region import Region
from dscheck.layout.tiling import tiled_in_order
from dscheck.manifest.dtypes import ITEMSIZE
from dscheck.manifest.fragments import Fragments
from dscheck.manifest.keys import LARGEST
from dscheck.manifest.place import block_count
from dscheck.manifest.rules import FragmentRules

MAX_NDIM = 64
MAX_BLOCK_BYTES = 1 << 30
MAX_INDEX = 2**31 - 1
"""Rows of a table, ranks and list items are counted in an int32."""


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One global tensor. `aliases`, sorted, are further names of the same tensor (tied parameters)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class RankRow:
    """One rank of the job that saved: its host, and its coordinate on each named dimension of its mesh."""

    rank: int
    host: str
    mesh: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """The map of a step: tensors by name, fragments by tensor and start, ranks by number, and sets of holders."""

    tensors: tuple[TensorRow, ...]
    fragments: Fragments
    ranks: tuple[RankRow, ...]
    holders: tuple[tuple[int, ...], ...]
    block_bytes: int

    def fragments_of(self, tensor: int) -> Fragments:
        """The fragments of the tensor with this index, by start."""
        begin, end = self.fragments.rows_of(tensor)
        return self.fragments[begin:end]

    def overlapping(self, wanted: Sequence[tuple[int, Region]]) -> tuple[Fragments, Ints]:
        """For each tensor and region of it the fragments that share an element with it, by start; and for each row of
        these the number of the one that it overlaps, ascending.
        """
        found = [self.fragments.overlapping(tensor, region) for tensor, region in wanted]
        return self.fragments.take(ints(chain.from_iterable(found))), np.repeat(
            np.arange(len(found)), ints(map(len, found))
        )

    def index(self) -> dict[str, int]:
        """The tensor's index by every name that it has."""
        return {name: i for i, tensor in enumerate(self.tensors) for name in tensor.names}

    def file_ends(self) -> list[tuple[int, int]]:
        """Of each rank's data file: where its last fragment ends, in bytes, and how many checksum blocks it has."""
        ends, blocks = np.zeros((2, len(self.ranks)), np.int64)
        rows = self.fragments
        np.maximum.at(ends, rows.writer, rows.offset + rows.nbytes)
        np.add.at(blocks, rows.writer, block_count(rows.nbytes, self.block_bytes))
        return list(zip(ends.tolist(), blocks.tolist(), strict=True))

    def untiled(self) -> Iterator[int]:
        """The tensors of which no pass over neighbours proves that their fragments tile them: most often none.

        `prove_cover` decides on these, and says what is wrong.
        """
        ndim = max((len(tensor.shape) for tensor in self.tensors), default=0)
        shapes = padded([tensor.shape for tensor in self.tensors], ndim)
        rows = self.fragments
        proved = tiled_in_order(rows.tensor[:0], shapes, *rows.boxes.part(0, 0).matrices(ndim))
        for begin, end in chunks(rows.boxes.at, opens(rows.tensor)):
            tensor = rows.tensor[begin:end]
            low, high = int(tensor[0]), int(tensor[-1]) + 1
            bounds = rows.boxes.part(begin, end).matrices(ndim)
            proved[low:high] = tiled_in_order(tensor - low, shapes[low:high], *bounds)
        yield from np.flatnonzero(~proved).tolist()

    def validate(self) -> None:
        """Raises LayoutError unless every row agrees with all others; whether fragments tile tensors is not asked."""
        check_head(self.tensors, self.ranks, self.holders, self.block_bytes)
        rules = FragmentRules(self.tensors, self.holders, self.block_bytes)
        rules.check(self.fragments)
        rules.check_files(self.fragments)


def check_head(
    tensors: Sequence[TensorRow], ranks: Sequence[RankRow], holders: Iterable[tuple[int, ...]], block_bytes: int
) -> None:
    """Raises LayoutError unless all of a plan but its fragments is right."""
    if not 1 <= block_bytes <= MAX_BLOCK_BYTES:
        raise LayoutError(f"a block has 1 to {MAX_BLOCK_BYTES} bytes, not {block_bytes}")
    _check_tensors(tensors)
    _check_ranks(ranks)
    for members in holders:
        _check_holders(members, len(ranks))


def _check_tensors(tensors: Sequence[TensorRow]) -> None:
    for tensor in tensors:
        if tensor.dtype not in ITEMSIZE:
            raise LayoutError(f"tensor '{tensor.name}' has the unknown dtype {tensor.dtype!r}")
        if len(tensor.shape) > MAX_NDIM or any(not 0 <= size <= LARGEST for size in tensor.shape):
            raise LayoutError(f"tensor '{tensor.name}' has the impossible shape {tensor.shape}")
        # Zeros left out: a reader may multiply in any order without overflow.
        if math.prod(size or 1 for size in tensor.shape) * ITEMSIZE[tensor.dtype] > LARGEST:
            raise LayoutError(f"tensor '{tensor.name}' of shape {tensor.shape} exceeds 2**63 bytes")
        _check_ascending(f"aliases of tensor '{tensor.name}'", tensor.aliases)
    _check_ascending("tensors", [tensor.name for tensor in tensors])
    names = [name for tensor in tensors for name in tensor.names]
    if "" in names:
        raise LayoutError("a tensor has an empty name")
    if len(set(names)) != len(names):
        twice = [name for name, times in Counter(names).items() if times > 1]
        raise LayoutError(f"the names {twice[:3]} belong to two tensors")


def _check_ascending(what: str, names: Iterable[str]) -> None:
    for before, name in pairwise(names):
        if before >= name:
            raise LayoutError(f"{what} are not in ascending order: {name!r} after {before!r}")


def _check_ranks(ranks: Sequence[RankRow]) -> None:
    for number, row in enumerate(ranks):
        if row.rank != number:
            raise LayoutError(f"row {number} of the ranks is rank {row.rank}")
        names = [name for name, _ in row.mesh]
        if len(set(names)) != len(names) or any(not 0 <= at <= MAX_INDEX for _, at in row.mesh):
            raise LayoutError(f"rank {number} has the impossible mesh coordinate {row.mesh}")


def _check_holders(members: tuple[int, ...], ranks: int) -> None:
    ascending = all(before < member for before, member in pairwise(members))
    if not members or not ascending or members[0] < 0 or members[-1] >= ranks:
        raise LayoutError(f"the holder set {members} is not an ascending set of the {ranks} ranks")
