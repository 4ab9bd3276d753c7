"""Random boxes and random exact tilings, for hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from dscheck.layout import Region

shapes = st.lists(st.integers(1, 9), max_size=4).map(tuple)


@st.composite
def boxes_in(draw: st.DrawFn, outer: Region, empty: bool = False) -> Region:
    bounds = [
        sorted(draw(st.lists(st.integers(a, b), min_size=2, max_size=2, unique=not empty)))
        for a, b in zip(outer.start, outer.stop, strict=True)
    ]
    return Region(tuple(a for a, _ in bounds), tuple(b for _, b in bounds))


@st.composite
def tilings(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Region]:
    """Boxes that tile the shape: cut again and again, and now and then into a pinwheel that no plane goes through."""
    tiles = [Region.whole(shape)]
    for _ in range(draw(st.integers(0, 8))):
        number = draw(st.integers(0, len(tiles) - 1))
        tiles[number : number + 1] = draw(_cut(tiles[number]))
    return draw(st.permutations(tiles))


@st.composite
def _cut(draw: st.DrawFn, tile: Region) -> list[Region]:
    wide = [dim for dim in range(tile.ndim) if tile.shape[dim] >= 3]
    if len(wide) >= 2 and draw(st.booleans()):
        return pinwheel(tile, *wide[:2])
    thick = [dim for dim in range(tile.ndim) if tile.shape[dim] >= 2]
    if not thick:
        return [tile]
    dim = draw(st.sampled_from(thick))
    at = draw(st.integers(tile.start[dim] + 1, tile.stop[dim] - 1))
    return [_bounded(tile, {dim: (tile.start[dim], at)}), _bounded(tile, {dim: (at, tile.stop[dim])})]


def pinwheel(tile: Region, x: int, y: int) -> list[Region]:
    """Five boxes around each other: every plane along x or y cuts one of them."""
    left, right = tile.start[x], tile.stop[x]
    low, high = tile.start[y], tile.stop[y]
    sides = [
        ((left, right - 1), (low, low + 1)),
        ((right - 1, right), (low, high - 1)),
        ((left + 1, right), (high - 1, high)),
        ((left, left + 1), (low + 1, high)),
        ((left + 1, right - 1), (low + 1, high - 1)),
    ]
    return [_bounded(tile, {x: along_x, y: along_y}) for along_x, along_y in sides]


def _bounded(tile: Region, bounds: dict[int, tuple[int, int]]) -> Region:
    start, stop = list(tile.start), list(tile.stop)
    for dim, (a, b) in bounds.items():
        start[dim], stop[dim] = a, b
    return Region(tuple(start), tuple(stop))
