"""From a mesh and placements to boxes: which elements of a global tensor a rank's local one holds, in what order.

torch keeps the placements of a tensor by mesh dimension, but the order in which it cut the tensor may be another: FSDP2
over tensor parallelism cuts the rightmost mesh dimension first and says so by a strided shard whose split factor is the
number of parts that were there before it. On uneven sizes only the order that really ran gives the right boxes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from dscheck.errors import LayoutError
from dscheck.layout.region import Region


@dataclass(frozen=True, slots=True)
class Replicate:
    """Every rank along the mesh dimension holds the same."""


@dataclass(frozen=True, slots=True)
class Shard:
    """The mesh dimension cuts tensor dimension `dim` (0 or more), after the shards of that dimension to its left."""

    dim: int


@dataclass(frozen=True, slots=True)
class StridedShard:
    """The mesh dimension cuts each of the `split_factor` parts that tensor dimension `dim` was in before it.

    Where the mesh dimensions to its right explain that number, it is only a matter of order (torch's `_StridedShard`
    under FSDP2). Where they do not, the local tensor is several pieces of the global one, one after the other.
    """

    dim: int
    split_factor: int


Placement = Replicate | Shard | StridedShard
_Line = list[range]  # what a rank holds along one dimension, in local order; never empty ranges
_Cut = tuple[int, int, int]  # split factor, parts, index of the part


def local_pieces(
    shape: Sequence[int], mesh_shape: Sequence[int], placements: Sequence[Placement], coordinate: Sequence[int] | None
) -> tuple[tuple[Region, Region], ...]:
    """The pieces of one rank: pairs of a box of the global tensor and the box of the local tensor that holds it.

    In local order; the local boxes tile the local tensor. None for `coordinate` is a rank outside the mesh: no pieces,
    as for an empty local tensor. Raises LayoutError when the arguments contradict each other.
    Compare `local_shape` with the real local tensor: another shape means that the tensor was cut in another way.
    >>> [(str(there), str(here)) for there, here in local_pieces((9,), (4, 2), (StridedShard(0, 2), Shard(0)), (3, 1))]
    [('[8:9]', '[0:1]')]
    >>> [(str(there), str(here)) for there, here in local_pieces((8,), (2,), (StridedShard(0, 2),), (1,))]
    [('[2:4]', '[0:2]'), ('[6:8]', '[2:4]')]
    """
    if coordinate is None:
        return ()
    lines = _lines(shape, mesh_shape, placements, coordinate)
    return tuple(
        (
            Region(tuple(there.start for there, _ in piece), tuple(there.stop for there, _ in piece)),
            Region(tuple(here.start for _, here in piece), tuple(here.stop for _, here in piece)),
        )
        for piece in product(*(_with_local(line) for line in lines))
    )


def local_shape(
    shape: Sequence[int], mesh_shape: Sequence[int], placements: Sequence[Placement], coordinate: Sequence[int]
) -> tuple[int, ...]:
    """The shape of the local tensor at `coordinate`, with 0 where nothing is left.

    >>> local_shape((1, 7), (4, 2), (Shard(0), Shard(1)), (3, 1))
    (0, 3)
    """
    return tuple(sum(map(len, line)) for line in _lines(shape, mesh_shape, placements, coordinate))


def _with_local(line: _Line) -> Iterator[tuple[range, range]]:
    at = 0
    for there in line:
        yield there, range(at, at + len(there))
        at += len(there)


def _lines(
    shape: Sequence[int], mesh_shape: Sequence[int], placements: Sequence[Placement], coordinate: Sequence[int]
) -> list[_Line]:
    if not len(mesh_shape) == len(placements) == len(coordinate):
        raise LayoutError(
            f"a mesh of shape {tuple(mesh_shape)} needs as many placements and coordinates: "
            f"{tuple(placements)} and {tuple(coordinate)}"
        )
    cuts: list[list[_Cut]] = [[] for _ in shape]
    for parts, placement, index in zip(mesh_shape, placements, coordinate, strict=True):
        if not 0 <= index < parts:
            raise LayoutError(f"coordinate {tuple(coordinate)} lies outside the mesh of shape {tuple(mesh_shape)}")
        if isinstance(placement, Replicate):
            continue
        split_factor = placement.split_factor if isinstance(placement, StridedShard) else 1
        if not 0 <= placement.dim < len(shape) or split_factor < 1:
            raise LayoutError(f"{placement} does not fit a tensor of shape {tuple(shape)}")
        cuts[placement.dim].append((split_factor, parts, index))
    return [_cut(size, along) for size, along in zip(shape, cuts, strict=True)]


def _cut(size: int, cuts: Sequence[_Cut]) -> _Line:
    """What is left of a dimension after its cuts, given by mesh dimension."""
    line = [range(size)] if size else []
    ordered = _in_order(cuts)
    for split_factor, parts, index in cuts if ordered is None else ordered:
        line = [held for part in range(split_factor) for held in _chunk(_chunk(line, split_factor, part), parts, index)]
    return _joined(line)


def _in_order(cuts: Sequence[_Cut]) -> list[_Cut] | None:
    """The cuts in the order in which they ran, without split factors; None when the factors name no order.

    Each cut, from the last mesh dimension to the first, goes where the parts before it multiply to its factor: a
    plain shard in front, so that plain ones run left to right, and FSDP2's strided ones behind those to their right.
    """
    ordered: list[_Cut] = []
    for split_factor, parts, index in reversed(cuts):
        before, at = 1, 0
        while before < split_factor and at < len(ordered):
            before *= ordered[at][1]
            at += 1
        if before != split_factor:
            return None
        ordered.insert(at, (1, parts, index))
    return ordered


def _chunk(line: _Line, parts: int, index: int) -> _Line:
    """Part `index` of the elements on a line, by the arithmetic of torch.chunk: equal parts, the last ones short."""
    length = sum(map(len, line))
    part = -(-length // parts)
    return _window(line, min(index * part, length), min((index + 1) * part, length))


def _window(line: _Line, start: int, stop: int) -> _Line:
    found = []
    for there, here in _with_local(line):
        held = there[max(start - here.start, 0) : max(stop - here.start, 0)]
        if held:
            found.append(held)
    return found


def _joined(line: _Line) -> _Line:
    """The same elements in as few ranges as possible."""
    joined: _Line = []
    for held in line:
        if joined and joined[-1].stop == held.start:
            held = range(joined.pop().start, held.stop)
        joined.append(held)
    return joined
