"""What each rank says it holds, in a form that travels: the input of the plan. No bytes of tensors, no torch."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dscheck.layout.region import Region
from dscheck.layout.shares import writer_shares
from dscheck.manifest.dtypes import ITEMSIZE

Exceptions = Mapping[tuple[str, Region], tuple[int, ...]]
"""Regions that other ranks write than their holders: contested ones and those that some replicas lack."""


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


@dataclass(frozen=True, slots=True)
class RankClaims:
    """All claims of one rank, sorted by name, with where it runs."""

    host: str
    mesh: tuple[tuple[str, int], ...]
    claims: tuple[Claim, ...]

    def encode(self) -> bytes:
        """A stable text of it; its digest tells whether the plan must be made anew."""
        rows = [
            [c.name, c.dtype, c.shape, [[r.start, r.stop] for r in c.regions], c.holders, c.proof, c.aliases]
            for c in self.claims
        ]
        return json.dumps([self.host, self.mesh, rows], separators=(",", ":")).encode()

    @classmethod
    def decode(cls, data: bytes) -> RankClaims:
        host, mesh, rows = json.loads(data)
        claims = tuple(
            Claim(name, dtype, tuple(shape), tuple(map(_region, boxes)), tuple(holders), proof, tuple(aliases))
            for name, dtype, shape, boxes, holders, proof, aliases in rows
        )
        return cls(host, tuple((dim, index) for dim, index in mesh), claims)


def _region(bounds: Sequence[Sequence[int]]) -> Region:
    return Region(tuple(bounds[0]), tuple(bounds[1]))


def share_of(rank: int, claim: Claim, region: Region, exceptions: Exceptions) -> list[Region]:
    """The boxes of `region` that `rank` writes: a pure function of what it knows alone, and of the last plan's
    exceptions.
    """
    writers = exceptions.get((claim.name, region), claim.holders)
    if rank not in writers:
        return []
    return [box for writer, box in writer_shares(claim.name, region, ITEMSIZE[claim.dtype], writers) if writer == rank]


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
        if contested is None or claim.proof == "claim" or (claim.name, region) in contested
    ]


def pack_exceptions(exceptions: Exceptions) -> list[Any]:
    return [[name, box.start, box.stop, ranks] for (name, box), ranks in exceptions.items()]


def unpack_exceptions(rows: Iterable[Any]) -> dict[tuple[str, Region], tuple[int, ...]]:
    return {(name, Region(tuple(start), tuple(stop))): tuple(ranks) for name, start, stop, ranks in rows}
