"""The merge of claims with an object for every region and fragment: the oracle for save/merge.py."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dscheck.errors import LayoutError, StateError
from dscheck.layout.cover import prove_cover
from dscheck.layout.region import Region
from dscheck.layout.shares import writer_shares
from dscheck.manifest.dtypes import ITEMSIZE
from dscheck.manifest.fragments import Fragment
from dscheck.manifest.plan import TensorRow
from dscheck.save.claims import Claim

Key = tuple[str, Region]


@dataclass
class Slow:
    """What a merge finds; `claimants` are the ranks that claim each contested region."""

    tensors: list[TensorRow]
    fragments: list[Fragment]
    holders: list[tuple[int, ...]]
    exceptions: dict[Key, tuple[int, ...]]
    claimants: dict[Key, list[int]]


@dataclass
class _Group:
    holders: tuple[int, ...]
    present: list[int]


def merge(ranks: Sequence[Sequence[Claim]], block_bytes: int) -> Slow:
    by_name: dict[str, list[tuple[int, Claim]]] = defaultdict(list)
    for rank, claims in enumerate(ranks):
        for claim in claims:
            by_name[claim.name].append((rank, claim))
    slow = Slow([], [], [], {}, {})
    pieces: list[tuple[int, Region, int, tuple[int, ...]]] = []
    for number, name in enumerate(sorted(by_name)):
        slow.tensors.append(_agree(name, by_name[name]))
        row, groups = slow.tensors[-1], _group(name, by_name[name])
        _prove(row, groups)
        for region, rivals in groups.items():
            winner = min(rivals, key=lambda group: group.present[0])
            held_by = tuple(sorted({rank for group in rivals for rank in group.present}))
            if len(rivals) > 1:
                slow.claimants[name, region] = list(held_by)
            if len(rivals) > 1 or len(winner.present) < len(winner.holders):
                slow.exceptions[name, region] = tuple(winner.present)
            writers, boxes = writer_shares(name, region, ITEMSIZE[row.dtype], tuple(winner.present))
            pieces += [(number, boxes.region(i), writer, held_by) for i, writer in enumerate(writers.tolist())]
    ends: dict[int, tuple[int, int]] = defaultdict(lambda: (0, 0))
    sets: dict[tuple[int, ...], int] = {}
    for tensor, region, writer, held_by in sorted(pieces, key=lambda piece: piece[:2]):
        nbytes = region.numel * ITEMSIZE[slow.tensors[tensor].dtype]
        end, blocks = ends[writer]
        alignment = 4096 if nbytes >= 1 << 20 else 64
        offset = -(-end // alignment) * alignment
        ends[writer] = offset + nbytes, blocks - -nbytes // block_bytes
        held = sets.setdefault(held_by, len(sets))
        slow.fragments.append(Fragment(tensor, region, writer, offset, nbytes, blocks, held))
    slow.holders = list(sets)
    return slow


def _agree(name: str, claims: Sequence[tuple[int, Claim]]) -> TensorRow:
    _, first = claims[0]
    for _, claim in claims:
        if (claim.dtype, claim.shape) != (first.dtype, first.shape):
            raise StateError(name)
    return TensorRow(name, first.dtype, first.shape, tuple(sorted({a for _, claim in claims for a in claim.aliases})))


def _group(name: str, claims: Sequence[tuple[int, Claim]]) -> dict[Region, list[_Group]]:
    groups: dict[Region, dict[tuple[int, ...], _Group]] = defaultdict(dict)
    by_holders: dict[tuple[int, ...], tuple[Region, ...]] = {}
    for rank, claim in claims:
        if rank not in claim.holders:
            continue
        if by_holders.setdefault(claim.holders, claim.regions) != claim.regions:
            raise LayoutError(name)
        for region in claim.regions:
            groups[region].setdefault(claim.holders, _Group(claim.holders, [])).present.append(rank)
    return {region: list(rivals.values()) for region, rivals in groups.items()}


def _prove(row: TensorRow, groups: Mapping[Region, Iterable[_Group]]) -> None:
    try:
        prove_cover(row.name, row.shape, list(groups))
    except LayoutError as error:
        if error.fields.get("overlap") is None:
            raise
        raise StateError(row.name) from error
