"""What each rank says it holds, in a form that travels: the input of the plan. No bytes of tensors, no torch."""

from __future__ import annotations

import base64
import json
import zlib
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from dscheck.errors import LayoutError
from dscheck.layout.boxes import Bools, Boxes, Ints, ints, spans
from dscheck.layout.region import Region
from dscheck.layout.shares import writer_shares
from dscheck.manifest.dtypes import ITEMSIZE
from dscheck.manifest.plan import TensorRow

Exceptions = Mapping[tuple[str, Region], tuple[int, ...]]
"""Regions that other ranks write than their holders: contested ones and those that some replicas lack."""

Run = tuple[int, int, int]
"""Ranks from the first on, below the second, in steps of the third."""

UNPROVED = "claim"
"""The proof of a tensor for which nothing but its name speaks."""


@dataclass(frozen=True, slots=True)
class Claim:
    """One tensor as one rank holds it: the fields of state/leaf.py's TensorLeaf, without its memory."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    regions: tuple[Region, ...]
    holders: tuple[int, ...]
    proof: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class RankClaims:
    """All claims of one rank, sorted by name, as columns, with where it runs.

    Tensor i is held by the ranks holders[held_by[i]] and claimed in the regions boxes[first[i] : first[i + 1]];
    `unproved` says whether only its name speaks for its replicas. Ranks with equal tensors share one tuple of them.
    """

    host: str
    mesh: tuple[tuple[str, int], ...]
    tensors: tuple[TensorRow, ...]
    holders: tuple[tuple[int, ...], ...]
    held_by: Ints
    unproved: Bools
    first: Ints
    boxes: Boxes

    @classmethod
    def of(cls, host: str, mesh: tuple[tuple[str, int], ...], claims: Iterable[Claim]) -> RankClaims:
        rows = sorted(claims, key=lambda claim: claim.name.encode(errors="surrogatepass"))
        holders: dict[tuple[int, ...], int] = {}
        held_by = ints(holders.setdefault(claim.holders, len(holders)) for claim in rows)
        return cls(
            host,
            mesh,
            tuple(TensorRow(claim.name, claim.dtype, claim.shape, claim.aliases) for claim in rows),
            tuple(holders),
            held_by,
            np.array([claim.proof == UNPROVED for claim in rows], np.bool_),
            _edges(ints(len(claim.regions) for claim in rows)),
            Boxes.of([region for claim in rows for region in claim.regions]),
        )

    def encode(self) -> bytes:
        """A stable text of it; its digest tells whether the plan must be made anew.

        Three lines: what is this rank's own, its tensors, which many ranks have alike, and the columns.
        """
        own = [self.host, self.mesh, list(map(_runs, self.holders))]
        tensors = [[row.name, row.dtype, row.shape, row.aliases] for row in self.tensors]
        columns = (self.held_by, np.diff(self.first), self.unproved.view(np.uint8), self.boxes.start, self.boxes.stop)
        packed = zlib.compress(b"".join(column.tobytes() for column in columns), 1)
        return b"\n".join((_json(own), _json(tensors), base64.b64encode(packed)))

    @classmethod
    def decode(cls, data: bytes, size: int) -> RankClaims:
        """What `encode` was given, from one of `size` ranks. Raises LayoutError for columns that do not fit."""
        own, table, packed = data.split(b"\n")
        host, mesh, runs = json.loads(own)
        tensors = _tensors(table)
        holders = tuple(_members(tuple(map(tuple, each)), size) for each in runs)
        columns, count = zlib.decompress(base64.b64decode(packed)), len(tensors)
        if len(columns) < 17 * count or (len(columns) - 17 * count) % 16:
            raise LayoutError(f"the claims of a rank on {host} have {len(columns)} bytes for {count} tensors")
        held_by, regions = np.frombuffer(columns, np.int64, 2 * count).reshape(2, count)
        unproved = np.frombuffer(columns, np.bool_, count, 16 * count)
        ndim = np.repeat(ints(len(row.shape) for row in tensors), np.maximum(regions, 0))
        start, stop = np.frombuffer(columns[17 * count :], np.int64).reshape(2, -1)
        if (regions < 0).any() or len(start) != ndim.sum() or not ((held_by >= 0) & (held_by < len(holders))).all():
            raise LayoutError(f"the claims of a rank on {host} do not fit its {count} tensors")
        mesh = tuple((dim, index) for dim, index in mesh)
        return cls(host, mesh, tensors, holders, held_by, unproved, _edges(regions), Boxes(_edges(ndim), start, stop))

    def holds(self, rank: int) -> Bools:
        """Which tensors `rank`, whose claims these are, holds itself; of others it only loads what the holders save."""
        own = [(at := bisect_left(members, rank)) < len(members) and members[at] == rank for members in self.holders]
        return np.array(own, np.bool_)[self.held_by]

    def watched(self, rank: int, contested: Ints | None) -> Ints:
        """The rows of `boxes` whose samples this rank sends, as `watch` has it: `contested` are rows."""
        chosen = self.holds(rank)
        if contested is not None:
            chosen = chosen & self.unproved
        rows = spans(self.first[:-1][chosen], np.diff(self.first)[chosen])
        return rows if contested is None else np.union1d(rows, contested)


def _edges(counts: Ints) -> Ints:
    edges = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=edges[1:])
    return edges


def _json(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


@lru_cache(1024)
def _tensors(text: bytes) -> tuple[TensorRow, ...]:
    """Equal texts, of ranks that hold parts of the same tensors, become one tuple."""
    rows = tuple(TensorRow(name, dtype, tuple(shape), tuple(more)) for name, dtype, shape, more in json.loads(text))
    names = [row.name.encode(errors="surrogatepass") for row in rows]
    if any(before >= name for before, name in pairwise(names)):
        raise LayoutError("the claims of a rank are not in the order of their names")
    return rows


def _runs(members: Sequence[int]) -> list[Run]:
    """Ranks in few numbers: what a mesh makes are arithmetic progressions."""
    runs: list[Run] = []
    for rank in members:
        if runs:
            first, stop, step = runs[-1]
            alone = stop == first + 1 and step == 1
            if alone or rank == stop - 1 + step:
                runs[-1] = (first, rank + 1, rank - first if alone else step)
                continue
        runs.append((rank, rank + 1, 1))
    return runs


@lru_cache(1 << 17)
def _members(runs: tuple[Run, ...], size: int) -> tuple[int, ...]:
    if any(not 0 <= first < stop <= size or step < 1 for first, stop, step in runs) or len(runs) > size:
        raise LayoutError(f"a holder set {runs} does not lie in {size} ranks")
    return tuple(rank for run in runs for rank in range(*run))


def share_of(rank: int, claim: Claim, region: Region, exceptions: Exceptions) -> list[Region]:
    """The boxes of `region` that `rank` writes: a pure function of what it knows alone, and of the last plan's
    exceptions.
    """
    holders = exceptions.get((claim.name, region), claim.holders)
    if rank not in holders or holders == (rank,):
        return [region] if region.numel and rank in holders else []
    writers, boxes = writer_shares(claim.name, region, ITEMSIZE[claim.dtype], holders)
    return [boxes.region(row) for row in np.flatnonzero(writers == rank).tolist()]


def watch(
    rank: int, size: int, claims: Sequence[Claim], contested: Collection[tuple[str, Region]] | None
) -> list[tuple[str, Region]]:
    """The regions whose samples `rank` of `size` sends: all that it claims when `contested` is None, else what needs
    comparing. One rank alone has nobody to be compared with.
    """
    return [
        (claim.name, region)
        for claim in (claims if size > 1 else ())
        if rank in claim.holders
        for region in claim.regions
        if contested is None or claim.proof == UNPROVED or (claim.name, region) in contested
    ]


def pack_exceptions(exceptions: Exceptions) -> list[Any]:
    return [[name, box.start, box.stop, ranks] for (name, box), ranks in exceptions.items()]


def unpack_exceptions(rows: Iterable[Any]) -> dict[tuple[str, Region], tuple[int, ...]]:
    return {(name, Region(tuple(start), tuple(stop))): tuple(ranks) for name, start, stop, ranks in rows}
