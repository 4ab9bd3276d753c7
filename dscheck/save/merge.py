"""The coordinator's half of planning: the claims of all ranks become one plan that tiles every tensor exactly once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dscheck.config import Replicas
from dscheck.errors import LayoutError, StateError
from dscheck.layout.cover import prove_cover
from dscheck.layout.region import Region
from dscheck.layout.shares import writer_shares
from dscheck.manifest.dtypes import ITEMSIZE
from dscheck.manifest.place import place
from dscheck.manifest.plan import Fragment, Plan, RankRow, TensorRow
from dscheck.save.claims import Claim, RankClaims

Samples = Mapping[tuple[int, str, Region], int]
"""(rank, tensor, region) → hash of its samples, for the regions whose samples were sent."""

ADVICE = (
    "Wrap what belongs to one rank in dscheck.per_rank(...), declare shards of one tensor with dscheck.sharded(...), "
    'or set replicas="first" to store the lowest rank\'s'
)


@dataclass(slots=True)
class Merged:
    """A plan, the exceptions to "its holders write it", and the regions whose samples must be compared at every
    save.
    """

    plan: Plan
    exceptions: dict[tuple[str, Region], tuple[int, ...]] = field(default_factory=dict)
    contested: set[tuple[str, Region]] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A fragment before it has a place in a file."""

    tensor: int
    region: Region
    writer: int
    holders: tuple[int, ...]


@dataclass(slots=True)
class _Group:
    """Ranks that hold one region and can prove it to each other; `present` are those that have it."""

    holders: tuple[int, ...]
    present: list[int]


def merge(ranks: Sequence[RankClaims], block_bytes: int) -> Merged:
    """One plan out of the claims of all ranks, in rank order.

    Raises StateError or LayoutError (IncompleteCoverError) with the tensor's name when the claims contradict each
    other. Samples are not looked at: `compare` does that at each save.
    """
    by_name: dict[str, list[tuple[int, Claim]]] = defaultdict(list)
    for rank, rank_claims in enumerate(ranks):
        for claim in rank_claims.claims:
            by_name[claim.name].append((rank, claim))
    names = sorted(by_name, key=_utf8)
    merged = Merged(Plan((), (), (), (), block_bytes))
    tensors, pieces = [], []
    for number, name in enumerate(names):
        tensors.append(_agree(name, by_name[name]))
        pieces += _divide(merged, number, tensors[-1], by_name[name])
    _refuse_ambiguous_aliases(tensors)
    rows = tuple(RankRow(rank, claims.host, claims.mesh) for rank, claims in enumerate(ranks))
    fragments, holders = _lay_out(pieces, tensors, block_bytes)
    merged.plan = Plan(tuple(tensors), fragments, rows, holders, block_bytes)
    merged.plan.validate()
    return merged


def _utf8(name: str) -> bytes:
    return name.encode()


def _agree(name: str, claims: Sequence[tuple[int, Claim]]) -> TensorRow:
    """The row of one tensor, or a refusal that names two ranks which see it differently."""
    first_rank, first = claims[0]
    for rank, claim in claims:
        if (claim.dtype, claim.shape) != (first.dtype, first.shape):
            raise StateError(
                f"tensor '{name}': rank {first_rank} has {first.dtype}{list(first.shape)}, rank {rank} has "
                f"{claim.dtype}{list(claim.shape)}. {ADVICE}",
                path=name,
                ranks=[first_rank, rank],
            )
    aliases = sorted({alias for _, claim in claims for alias in claim.aliases}, key=_utf8)
    return TensorRow(name, first.dtype, first.shape, tuple(aliases))


def _refuse_ambiguous_aliases(tensors: Iterable[TensorRow]) -> None:
    owner = {row.name: row.name for row in tensors}
    for row in tensors:
        for alias in row.aliases:
            if owner.setdefault(alias, row.name) != row.name:
                raise StateError(
                    f"'{alias}' is tied to '{row.name}' on one rank and is another tensor on another: give them one "
                    "tie on all ranks, or none",
                    path=alias,
                )


def _divide(merged: Merged, number: int, row: TensorRow, claims: Sequence[tuple[int, Claim]]) -> list[_Piece]:
    """The pieces of one tensor, each with its writer; fills in the exceptions and contested regions on the way."""
    groups = _group(row.name, claims)
    _prove(row, groups)
    pieces = []
    for region, rivals in groups.items():
        winner = min(rivals, key=lambda group: group.present[0])
        key = (row.name, region)
        if len(rivals) > 1:
            merged.contested.add(key)
        if len(rivals) > 1 or len(winner.present) < len(winner.holders):
            merged.exceptions[key] = tuple(winner.present)
        held_by = tuple(sorted({rank for group in rivals for rank in group.present}))
        for writer, box in writer_shares(row.name, region, ITEMSIZE[row.dtype], tuple(winner.present)):
            pieces.append(_Piece(number, box, writer, held_by))
    return pieces


def _group(name: str, claims: Sequence[tuple[int, Claim]]) -> dict[Region, list[_Group]]:
    """For each region, the groups of ranks that claim it. Ranks that only load a tensor claim nothing."""
    groups: dict[Region, dict[tuple[int, ...], _Group]] = defaultdict(dict)
    by_holders: dict[tuple[int, ...], tuple[int, tuple[Region, ...]]] = {}
    for rank, claim in claims:
        if rank not in claim.holders:
            continue
        other, regions = by_holders.setdefault(claim.holders, (rank, claim.regions))
        if regions != claim.regions:
            raise LayoutError(
                f"tensor '{name}': ranks {other} and {rank} are replicas by their mesh, yet hold {_boxes(regions)} and "
                f"{_boxes(claim.regions)}",
                tensor=name,
            )
        for region in claim.regions:
            groups[region].setdefault(claim.holders, _Group(claim.holders, [])).present.append(rank)
    return {region: list(rivals.values()) for region, rivals in groups.items()}


def _boxes(regions: Iterable[Region]) -> str:
    return " ".join(map(str, regions)) or "nothing"


def _prove(row: TensorRow, groups: Mapping[Region, Sequence[_Group]]) -> None:
    """Invariant C4. An overlap between ranks is told as what it mostly is: local things under one global name."""
    try:
        prove_cover(row.name, row.shape, list(groups))
    except LayoutError as error:
        overlap = error.fields.get("overlap")
        if overlap is None:
            raise
        ranks = sorted(
            {r for box, rivals in groups.items() if box.intersect(overlap) for g in rivals for r in g.present}
        )
        raise StateError(
            f"tensor '{row.name}': ranks {ranks} claim different regions that overlap in {overlap}. {ADVICE}",
            path=row.name,
            ranks=ranks,
        ) from error


def _lay_out(
    pieces: list[_Piece], tensors: Sequence[TensorRow], block_bytes: int
) -> tuple[tuple[Fragment, ...], tuple[tuple[int, ...], ...]]:
    """Places in the writers' files, each file in the order of tensor and start, and the table of holder sets."""
    pieces.sort(key=lambda piece: (piece.tensor, piece.region))
    sets: dict[tuple[int, ...], int] = {}
    by_writer: dict[int, list[int]] = defaultdict(list)
    for index, piece in enumerate(pieces):
        sets.setdefault(piece.holders, len(sets))
        by_writer[piece.writer].append(index)
    sizes = [piece.region.numel * ITEMSIZE[tensors[piece.tensor].dtype] for piece in pieces]
    spots: dict[int, tuple[int, int]] = {}
    for indices in by_writer.values():
        offsets, blocks, _ = place([sizes[index] for index in indices], block_bytes)
        spots.update(zip(indices, zip(offsets, blocks, strict=True), strict=True))
    fragments = tuple(
        Fragment(p.tensor, p.region, p.writer, spots[i][0], sizes[i], spots[i][1], sets[p.holders])
        for i, p in enumerate(pieces)
    )
    return fragments, tuple(sets)


def compare(
    contested: Iterable[tuple[str, Region]],
    ranks: Sequence[RankClaims],
    samples: Samples,
    replicas: Replicas,
) -> bool:
    """Refuse ranks that claim one region and differ in its samples (invariant C14).

    False when samples that are needed were not sent, because the plan changed on another rank alone.
    """
    if replicas == "first" or not contested:
        return True
    claims = [{claim.name: claim for claim in rank.claims} for rank in ranks]
    for name, region in sorted(contested):
        claimants = [rank for rank, by_name in enumerate(claims) if _claims(by_name.get(name), rank, region)]
        hashes = [samples.get((rank, name, region)) for rank in claimants]
        if None in hashes:
            return False
        if len(set(hashes)) > 1:
            other = next(rank for rank, found in zip(claimants, hashes, strict=True) if found != hashes[0])
            raise StateError(
                f"tensor '{name}' {region}: ranks {claimants[0]} and {other} hold different values under one "
                f"name. {ADVICE}",
                path=name,
                ranks=[claimants[0], other],
            )
    return True


def _claims(claim: Claim | None, rank: int, region: Region) -> bool:
    return claim is not None and rank in claim.holders and region in claim.regions
