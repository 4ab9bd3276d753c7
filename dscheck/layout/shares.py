"""Who writes what of a region that several ranks hold: a pure function, so that each rank knows without asking."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

from dscheck.errors import LayoutError
from dscheck.layout.boxes import Boxes, Ints, ints
from dscheck.layout.flat import flat_range_boxes
from dscheck.layout.region import Region

SPLIT_BYTES = 1 << 20  # a smaller region goes to one writer: more and smaller fragments cost more than they balance
ROUNDING = 64  # a cut moves by at most one 64th of a share, so that its two cuts cost a share one 32nd


def writer_shares(name: str, region: Region, itemsize: int, holders: Sequence[int]) -> tuple[Ints, Boxes]:
    """A rank and a box that it writes, row by row in flat order, which tile `region`; none for an empty region.

    `holders` are the global ranks that hold all of `region`, ascending. Below 1 MiB one of them writes it whole;
    from there on each writes an equal share, to within one 32nd. Which one starts is a hash of name and region, so
    that what does not divide is spread over the ranks. The result is part of the protocol: all ranks must agree on it.
    Raises LayoutError when holders are missing or not ascending.
    >>> writers, boxes = writer_shares("w", Region((0, 0), (600, 1024)), 4, (2, 5))
    >>> writers.tolist(), str(boxes.region(0)), str(boxes.region(1))
    ([5, 2], '[0:300, 0:1024]', '[300:600, 0:1024]')
    """
    if not holders or any(a >= b for a, b in pairwise(holders)):
        raise LayoutError(f"the holders of {name!r} {region} must be one or more ranks, ascending: {tuple(holders)}")
    if not region.numel:
        return ints(()), Boxes.of(())
    if len(holders) == 1:
        return ints(holders), Boxes.of([region])
    turn = int.from_bytes(hashlib.sha256(f"{name} {region}".encode(errors="surrogatepass")).digest()[:8], "big")
    if region.numel * itemsize < SPLIT_BYTES:
        return ints([holders[turn % len(holders)]]), Boxes.of([region])
    number, boxes = _shares(region.shape, len(holders))
    return ints(holders)[(turn % len(holders) + number) % len(holders)], boxes.shift(region.start)


@lru_cache(256)
def _shares(shape: tuple[int, ...], parts: int) -> tuple[Ints, Boxes]:
    """The number of its share and the bounds of each box; layers have the same shapes again and again."""
    cuts = list(pairwise(_cuts(shape, parts)))
    shares = [(number, box) for number, cut in enumerate(cuts) for box in flat_range_boxes(shape, *cut)]
    return ints(number for number, _ in shares), Boxes.of([box for _, box in shares])


def _cuts(shape: Sequence[int], parts: int) -> Iterator[int]:
    """Flat element indices from 0 to numel that cut a tensor into equal parts, at row ends where that is cheap."""
    numel = math.prod(shape)
    # Sizes of a row of each depth, the largest first; the last is one element.
    rows = list(accumulate(reversed(shape[1:]), initial=1, func=lambda size, inner: size * inner))[::-1]
    for number in range(parts + 1):
        exact = number * numel // parts
        rounded = ((exact + row // 2) // row * row for row in rows)
        yield next(cut for cut in rounded if abs(cut - exact) * ROUNDING * parts <= numel)
