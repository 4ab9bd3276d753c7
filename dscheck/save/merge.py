"""The coordinator's half of planning: the claims of all ranks become one plan that tiles every tensor exactly once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dscheck.errors import LayoutError, StateError
from dscheck.layout.boxes import MAX_ITEMS, Bools, Boxes, Int32s, Ints, ints, joined, opens, padded, spans
from dscheck.layout.cover import prove_cover
from dscheck.layout.region import Region
from dscheck.layout.shares import writer_shares
from dscheck.layout.tiling import tiled_in_order
from dscheck.manifest.dtypes import ITEMSIZE
from dscheck.manifest.fragments import Fragments
from dscheck.manifest.place import by_file, place_all
from dscheck.manifest.plan import Plan, RankRow, TensorRow
from dscheck.save.claims import RankClaims
from dscheck.save.rivals import ADVICE, Rivals


@dataclass(slots=True)
class Merged:
    """A plan, what is asked of it at every save, the exceptions to "its holders write it", and the regions whose
    samples must be compared at every save. `file_ends` as in Plan; `nbytes` of all fragments.
    """

    plan: Plan
    file_ends: Sequence[tuple[int, int]] = ()
    nbytes: int = 0
    exceptions: dict[tuple[str, Region], tuple[int, ...]] = field(default_factory=dict)
    rivals: Rivals = field(default_factory=Rivals)


def merge(ranks: Sequence[RankClaims], block_bytes: int) -> Merged:
    """One plan out of the claims of all ranks, in rank order.

    Raises StateError or LayoutError (IncompleteCoverError) with the tensor's name when the claims contradict each
    other. Samples are not looked at: `Rivals.agree` does that at each save.
    """
    tensors, numbers = _agree(ranks)
    _refuse_ambiguous_aliases(tensors)
    sets, parts = _Sets(), list[_Pieces]()
    merged = Merged(Plan((), Fragments.of([]), (), (), block_bytes))
    for claims in _gathered(ranks, tensors, numbers, sets):
        parts.append(_divide(merged, claims, tensors, sets))
    pieces = _Pieces.joined(parts)
    offsets, first_blocks = place_all(pieces.writer, pieces.nbytes, block_bytes)
    holders, held = sets.in_order(pieces.holders)
    fragments = Fragments(pieces.tensor, pieces.boxes, pieces.writer, offsets, pieces.nbytes, first_blocks, held)
    rows = tuple(RankRow(rank, claims.host, claims.mesh) for rank, claims in enumerate(ranks))
    merged.plan = plan = Plan(tensors, fragments, rows, holders, block_bytes)
    merged.file_ends, merged.nbytes = plan.file_ends(), int(pieces.nbytes.sum())
    return merged


def _utf8(name: str) -> bytes:
    return name.encode()


def _agree(ranks: Sequence[RankClaims]) -> tuple[tuple[TensorRow, ...], dict[int, Ints]]:
    """The tensors of all ranks by name, and for each tuple of them, by identity, the number of each of its rows.

    Raises StateError, which names two ranks, where ranks see a tensor differently.
    """
    tables: dict[int, int] = {}
    for rank, claims in enumerate(ranks):
        tables.setdefault(id(claims.tensors), rank)
    seen: dict[str, tuple[int, TensorRow]] = {}
    aliases: dict[str, set[str]] = {}
    for rank in tables.values():
        for row in ranks[rank].tensors:
            first_rank, first = seen.setdefault(row.name, (rank, row))
            if (row.dtype, row.shape) != (first.dtype, first.shape):
                raise StateError(
                    f"tensor '{row.name}': rank {first_rank} has {first.dtype}{list(first.shape)}, rank {rank} has "
                    f"{row.dtype}{list(row.shape)}. {ADVICE}",
                    path=row.name,
                    ranks=[first_rank, rank],
                )
            if row.aliases:
                aliases.setdefault(row.name, set()).update(row.aliases)
    names = sorted(seen, key=_utf8)
    number = {name: i for i, name in enumerate(names)}
    tied = {name: tuple(sorted(more, key=_utf8)) for name, more in aliases.items()}
    tensors = tuple(replace(seen[name][1], aliases=tied[name]) if name in tied else seen[name][1] for name in names)
    return tensors, {table: ints(number[row.name] for row in ranks[rank].tensors) for table, rank in tables.items()}


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


class _Sets:
    """The distinct holder sets, numbered as they come."""

    def __init__(self) -> None:
        self.members: list[tuple[int, ...]] = []
        self._numbers: dict[tuple[int, ...], int] = {}
        self._known: dict[int, int] = {}

    def number(self, members: tuple[int, ...]) -> int:
        known = self._known.get(id(members))  # the claims keep theirs alive; to hash thousands of ranks takes longer
        return self.add(members) if known is None else known

    def add(self, members: tuple[int, ...]) -> int:
        found = self._numbers.setdefault(members, len(self.members))
        if found == len(self.members):
            self.members.append(members)
        self._known[id(self.members[found])] = found
        return found

    def sizes(self) -> Ints:
        return ints(map(len, self.members))

    def in_order(self, used: Int32s) -> tuple[tuple[tuple[int, ...], ...], Int32s]:
        """The sets that are used, in the order of their first use, and `used` by their new numbers."""
        first = np.full(len(self.members), len(used))
        np.minimum.at(first, used, np.arange(len(used)))
        order = np.argsort(first, kind="stable")[: int((first < len(used)).sum())]
        renamed = np.zeros(len(self.members), np.int32)
        renamed[order] = np.arange(len(order))
        return tuple(self.members[number] for number in order.tolist()), renamed[used]


@dataclass(frozen=True, slots=True)
class _Claims:
    """What all ranks claim of the tensors from `low` on, below `high`, as columns.

    A claim is one tensor of one rank, ascending by rank: its tensor, less `low`, its holder set, and its `count` rows
    of `start` and `stop` from `begin` on. `row` is the number of a row among the regions of its rank.
    """

    low: int
    high: int
    shapes: Ints
    tensor: Ints
    rank: Ints
    holders: Ints
    begin: Ints
    count: Ints
    row: Ints
    start: Ints
    stop: Ints


def _gathered(
    ranks: Sequence[RankClaims], tensors: Sequence[TensorRow], numbers: dict[int, Ints], sets: _Sets
) -> Iterator[_Claims]:
    """The claims, some tensors at a time. Ranks that only load a tensor claim nothing."""
    ndim = max((len(row.shape) for row in tensors), default=0)
    shapes = padded([row.shape for row in tensors], ndim)
    set_numbers = [ints(map(sets.number, claims.holders)) for claims in ranks]
    held = [claims.holds(rank) for rank, claims in enumerate(ranks)]
    regions = np.zeros(len(tensors), np.int64)
    for claims in ranks:
        regions[numbers[id(claims.tensors)]] += np.diff(claims.first)
    total, low = np.append(0, np.cumsum(regions * max(1, ndim))), 0
    while low < len(tensors):
        high = max(low + 1, int(np.searchsorted(total, total[low] + MAX_ITEMS, side="right")) - 1)
        ends = {table: np.searchsorted(known, [low, high]).tolist() for table, known in numbers.items()}
        mine = [(rank, claims, *ends[id(claims.tensors)]) for rank, claims in enumerate(ranks)]
        mine = [part for part in mine if part[2] < part[3]]
        none = [np.empty(0, np.int64)]
        first = [claims.first[a : b + 1] for _, claims, a, b in mine]
        boxes = Boxes.joined(
            [c.boxes.part(int(at[0]), int(at[-1])) for (_, c, _, _), at in zip(mine, first, strict=True)]
        )
        count = np.concatenate(none + list(map(np.diff, first)))
        start, stop = boxes.matrices(ndim)
        kept = np.concatenate([np.empty(0, np.bool_), *(held[rank][a:b] for rank, _, a, b in mine)])
        begin = np.cumsum(count) - count
        yield _Claims(
            low,
            high,
            shapes[low:high],
            np.concatenate(none + [numbers[id(claims.tensors)][a:b] for _, claims, a, b in mine])[kept] - low,
            np.repeat(ints(rank for rank, *_ in mine), ints(b - a for *_, a, b in mine))[kept],
            np.concatenate(none + [set_numbers[rank][claims.held_by[a:b]] for rank, claims, a, b in mine])[kept],
            begin[kept],
            count[kept],
            np.concatenate(none + [np.arange(at[0], at[-1]) for at in first]),
            start,
            stop,
        )
        low = high


@dataclass(frozen=True, slots=True)
class _Pieces:
    """Fragments before they have a place in a file, by tensor and start."""

    tensor: Int32s
    boxes: Boxes
    writer: Int32s
    nbytes: Ints
    holders: Int32s

    @classmethod
    def joined(cls, parts: list[_Pieces]) -> _Pieces:
        """All parts in order; the list is emptied."""
        tensor, writer, holders = ([getattr(part, name) for part in parts] for name in ("tensor", "writer", "holders"))
        nbytes, boxes = [part.nbytes for part in parts], [part.boxes for part in parts]
        parts.clear()
        return cls(
            joined(tensor, np.int32),
            Boxes.joined(boxes),
            joined(writer, np.int32),
            joined(nbytes, np.int64),
            joined(holders, np.int32),
        )


def _divide(merged: Merged, claims: _Claims, tensors: Sequence[TensorRow], sets: _Sets) -> _Pieces:
    """The pieces of these tensors, each with its writer; notes exceptions and rivals on the way."""
    _refuse_false_replicas(claims, tensors, sets)
    regions = _Regions.of(claims)
    _prove(claims, regions, tensors)
    sizes = sets.sizes()
    alike = regions.alike & (regions.members == sizes[regions.holders])
    filled = (regions.start < regions.stop).all(axis=1)
    alone = np.flatnonzero(filled & alike & (regions.members == 1))
    columns = [(regions.tensor[alone], regions.start[alone], regions.stop[alone], regions.first_rank[alone])]
    held = [regions.holders[alone]]
    for number in np.flatnonzero(~alike | (filled & (regions.members > 1))).tolist():
        row, region = tensors[claims.low + int(regions.tensor[number])], regions.region(number, tensors, claims.low)
        if alike[number]:
            writers = members = sets.members[int(regions.holders[number])]
        else:
            present, holders, rows = regions.claimants(number)
            writers = tuple(present[holders == holders[0]].tolist())
            members = tuple(sorted(set(present.tolist())))
            merged.exceptions[row.name, region] = writers
            if not regions.alike[number]:
                merged.rivals.add((row.name, region), present, claims.row[rows])
        writer, boxes = writer_shares(row.name, region, ITEMSIZE[row.dtype], writers)
        bounds = boxes.matrices(claims.shapes.shape[1])
        columns.append((np.full(len(writer), regions.tensor[number]), *bounds, writer))
        held.append(np.full(len(writer), sets.add(members)))
    tensor, start, stop, writer = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    holders = np.concatenate(held)
    if len(columns) > 1:
        order = np.lexsort((_flat(claims.shapes, tensor, start), tensor))
        tensor, start, stop, writer, holders = (each[order] for each in (tensor, start, stop, writer, holders))
    itemsizes = ints(ITEMSIZE[row.dtype] for row in tensors[claims.low : claims.high])
    ndim = ints(len(row.shape) for row in tensors[claims.low : claims.high])
    return _Pieces(
        (tensor + claims.low).astype(np.int32),
        Boxes.cut(start, stop, ndim[tensor]),
        writer.astype(np.int32),
        (stop - start).prod(axis=1) * itemsizes[tensor],
        holders.astype(np.int32),
    )


def _flat(shapes: Ints, tensor: Ints, corner: Ints) -> Ints:
    """The index of an element in its flattened tensor: ascending as its indices are, dimension by dimension."""
    strides = np.ones_like(shapes)
    strides[:, :-1] = np.cumprod(np.maximum(shapes, 1)[:, :0:-1], axis=1)[:, ::-1]
    found: Ints = (corner * strides[tensor]).sum(axis=1)
    return found


@dataclass(frozen=True, slots=True)
class _Regions:
    """The distinct regions that are claimed, by tensor and start, and of each the ranks that claim it, ascending.

    `order` are the rows of the claims by region; those of region i begin at `begin[i]`, and there are `members[i]`.
    `alike`: they all name one holder set, which is `holders`; else that is the set of the lowest rank.
    """

    tensor: Ints
    start: Ints
    stop: Ints
    begin: Ints
    members: Ints
    alike: Bools
    holders: Ints
    first_rank: Ints
    order: Ints
    rank_of: Ints
    holders_of: Ints

    @classmethod
    def of(cls, claims: _Claims) -> _Regions:
        rows = spans(claims.begin, claims.count)
        tensor, rank, holders = (np.repeat(c, claims.count) for c in (claims.tensor, claims.rank, claims.holders))
        order = by_file(tensor.astype(np.int32))
        start, stop = claims.start[rows], claims.stop[rows]
        keys = [_flat(claims.shapes + more, tensor, corner) for more, corner in ((1, stop), (0, start))]
        if not _ascending(*(key[order] for key in (tensor, keys[1], keys[0]))):
            order = np.lexsort((*keys, tensor))
        tensor, rank, holders, start, stop = (each[order] for each in (tensor, rank, holders, start, stop))
        new = opens(tensor, *start.T, *stop.T)
        begin = np.flatnonzero(new)
        alike = np.ones(0, np.bool_)
        if len(begin):
            alike = np.minimum.reduceat(holders, begin) == np.maximum.reduceat(holders, begin)
        members = np.diff(np.append(begin, len(tensor)))
        return cls(
            tensor[begin],
            start[begin],
            stop[begin],
            begin,
            members,
            alike,
            holders[begin],
            rank[begin],
            rows[order],
            rank,
            holders,
        )

    def claimants(self, number: int) -> tuple[Ints, Ints, Ints]:
        """Of one region: the ranks that claim it, the holder set that each names, and the rows of these claims."""
        rows = slice(int(self.begin[number]), int(self.begin[number] + self.members[number]))
        return self.rank_of[rows], self.holders_of[rows], self.order[rows]

    def region(self, number: int, tensors: Sequence[TensorRow], low: int) -> Region:
        ndim = len(tensors[low + int(self.tensor[number])].shape)
        return Region(tuple(self.start[number, :ndim].tolist()), tuple(self.stop[number, :ndim].tolist()))


def _ascending(*columns: Ints) -> bool:
    """Whether rows are in order, the first column deciding first."""
    undecided = np.ones(max(0, len(columns[0]) - 1), np.bool_)
    for column in columns:
        step = np.diff(column)
        if (undecided & (step < 0)).any():
            return False
        undecided &= step == 0
    return True


def _refuse_false_replicas(claims: _Claims, tensors: Sequence[TensorRow], sets: _Sets) -> None:
    """Ranks that name one holder set, which their mesh proves, hold the same regions in the same order."""
    shared = np.flatnonzero(sets.sizes()[claims.holders] > 1)
    shared = shared[np.lexsort((claims.holders[shared], claims.tensor[shared]))]
    if not len(shared):
        return
    opening = opens(claims.tensor[shared], claims.holders[shared])
    twin = shared[np.maximum.accumulate(np.where(opening, np.arange(len(shared)), 0))]
    other = claims.count[shared] != claims.count[twin]
    same = ~other
    count = claims.count[shared][same]
    rows, twins = spans(claims.begin[shared][same], count), spans(claims.begin[twin][same], count)
    differs = (claims.start[rows] != claims.start[twins]).any(axis=1) | (claims.stop[rows] != claims.stop[twins]).any(
        axis=1
    )
    other[np.repeat(np.flatnonzero(same), count)[differs]] = True
    if not other.any():
        return
    at = min(np.flatnonzero(other).tolist(), key=lambda at: (claims.tensor[shared[at]], claims.rank[shared[at]]))
    one, another = int(twin[at]), int(shared[at])
    row = tensors[claims.low + int(claims.tensor[one])]
    raise LayoutError(
        f"tensor '{row.name}': ranks {claims.rank[one]} and {claims.rank[another]} are replicas by their mesh, yet "
        f"hold {_boxes(claims, one, len(row.shape))} and {_boxes(claims, another, len(row.shape))}",
        tensor=row.name,
    )


def _boxes(claims: _Claims, number: int, ndim: int) -> str:
    rows = range(int(claims.begin[number]), int(claims.begin[number] + claims.count[number]))
    bounds = ((claims.start[row, :ndim].tolist(), claims.stop[row, :ndim].tolist()) for row in rows)
    return " ".join(str(Region(tuple(start), tuple(stop))) for start, stop in bounds) or "nothing"


def _prove(claims: _Claims, regions: _Regions, tensors: Sequence[TensorRow]) -> None:
    """Invariant C4. An overlap between ranks is told as what it mostly is: local things under one global name."""
    filled = np.flatnonzero((regions.start < regions.stop).all(axis=1))
    proved = tiled_in_order(regions.tensor[filled], claims.shapes, regions.start[filled], regions.stop[filled])
    for number in np.flatnonzero(~proved).tolist():
        row = tensors[claims.low + number]
        mine = range(*np.searchsorted(regions.tensor, [number, number + 1]).tolist())
        boxes = {regions.region(at, tensors, claims.low): at for at in mine}
        try:
            prove_cover(row.name, row.shape, list(boxes))
        except LayoutError as error:
            overlap = error.fields.get("overlap")
            if overlap is None:
                raise
            hit = [regions.claimants(at)[0] for box, at in boxes.items() if box.intersect(overlap)]
            ranks = np.unique(np.concatenate(hit)).tolist()
            raise StateError(
                f"tensor '{row.name}': ranks {ranks} claim different regions that overlap in {overlap}. {ADVICE}",
                path=row.name,
                ranks=ranks,
            ) from error
