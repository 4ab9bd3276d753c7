"""The proof that fragments tile a tensor: every element once, and if not, a box that shows it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from dscheck.errors import IncompleteCoverError, LayoutError
from dscheck.layout.region import Region


def prove_cover(name: str, shape: Sequence[int], regions: Iterable[Region]) -> None:
    """Every element of a tensor of `shape` lies in exactly one of `regions`; empty regions do not count.

    Raises IncompleteCoverError with `tensor` and one box that proves the contrary: `missing` lies in no region,
    `overlap` in two or more, `outside` is a region that leaves the tensor; the other two fields are None.
    Raises LayoutError for regions of another number of dimensions. Near-linear for cuts along planes that go through
    (rows, grids, flat ranges, and any nesting of them); quadratic at worst.
    >>> prove_cover("w", (4, 6), [Region((0, 0), (4, 2)), Region((0, 2), (3, 6)), Region((3, 2), (4, 6))])
    """
    whole, filled = Region.whole(shape), list[Region]()
    for region in regions:
        if region.ndim != whole.ndim:
            raise LayoutError(f"tensor {name!r} has {whole.ndim} dimensions, its fragment {region} has {region.ndim}")
        if region.numel and not whole.contains(region):
            raise _fault(name, shape, f"fragment {region} leaves the tensor", outside=region)
        if region.numel:
            filled.append(region)
    if not whole.numel:
        return
    for cell, covers in _cells(whole, filled):
        if not covers:
            raise _fault(name, shape, f"no fragment covers {cell}", missing=cell)
        if covers > 1:
            both = [str(region) for region in filled if region.contains(cell)]
            raise _fault(name, shape, f"{covers} fragments cover {cell}: {', '.join(both[:4])}", overlap=cell)


def uncovered(wanted: Region, regions: Iterable[Region]) -> Region | None:
    """Some box of `wanted` that none of `regions` covers, or None; they may overlap and reach beyond it.

    >>> uncovered(Region((2,), (9,)), [Region((0,), (4,)), Region((6,), (12,))])
    Region(start=(4,), stop=(6,))
    """
    if not wanted.numel:
        return None
    clipped = {box for region in regions if (box := wanted.intersect(region)) is not None}
    if wanted in clipped:
        return None
    return next((cell for cell, covers in _cells(wanted, list(clipped)) if not covers), None)


def _fault(
    name: str,
    shape: Sequence[int],
    what: str,
    missing: Region | None = None,
    overlap: Region | None = None,
    outside: Region | None = None,
) -> IncompleteCoverError:
    return IncompleteCoverError(
        f"tensor {name!r} of shape {tuple(shape)}: {what}. Every element needs exactly one fragment: "
        f"compare the global shape and the placements or offsets that its ranks declare",
        tensor=name,
        missing=missing,
        overlap=overlap,
        outside=outside,
    )


def _cells(box: Region, regions: list[Region]) -> Iterator[tuple[Region, int]]:
    """Boxes that tile `box`, each with the number of `regions` that contain it; the others do not touch it.

    The regions lie in `box` and none is empty.
    """
    todo = [(box, regions)]
    while todo:
        box, regions = todo.pop()
        if not regions or (len(regions) == 1 and regions[0] == box):
            yield box, len(regions)
            continue
        parts = _split_at_gaps(box, regions) or _split_in_half(box, regions)
        if parts:
            todo.extend(reversed(parts))
        else:  # no region has an edge inside the box
            yield box, len(regions)


_Part = tuple[Region, list[Region]]


def _split_at_gaps(box: Region, regions: list[Region]) -> list[_Part]:
    """The box cut along one dimension wherever no region is cut by it; nothing if there is no such plane."""
    for dim in range(box.ndim):
        parts: list[_Part] = []
        at, group = box.start[dim], list[Region]()
        end = at
        for region in sorted(regions, key=lambda region: region.start[dim]):
            start, stop = region.start[dim], region.stop[dim]
            if start >= end:
                if group:
                    parts.append((_slab(box, dim, at, end), group))
                if start > end:
                    parts.append((_slab(box, dim, end, start), []))
                at, group = start, []
            group.append(region)
            end = max(end, stop)
        parts.append((_slab(box, dim, at, end), group))
        if end < box.stop[dim]:
            parts.append((_slab(box, dim, end, box.stop[dim]), []))
        if len(parts) > 1:
            return parts
    return []


def _split_in_half(box: Region, regions: list[Region]) -> list[_Part]:
    """The box cut along the plane that halves the edges of a dimension and cuts the fewest regions; nothing without."""
    planes = []
    for dim in range(box.ndim):
        edges = {edge for region in regions for edge in (region.start[dim], region.stop[dim])}
        inner = sorted(edges - {box.start[dim], box.stop[dim]})
        if inner:
            at = inner[len(inner) // 2]
            planes.append((sum(region.start[dim] < at < region.stop[dim] for region in regions), dim, at))
    if not planes:
        return []
    _, dim, at = min(planes)
    halves = (_slab(box, dim, box.start[dim], at), _slab(box, dim, at, box.stop[dim]))
    return [(half, [cut for region in regions if (cut := region.intersect(half)) is not None]) for half in halves]


def _slab(box: Region, dim: int, start: int, stop: int) -> Region:
    return Region(
        (*box.start[:dim], start, *box.start[dim + 1 :]),
        (*box.stop[:dim], stop, *box.stop[dim + 1 :]),
    )
