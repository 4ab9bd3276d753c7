"""Where a box lies in the bytes of a larger one: the ranges to read or copy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

from dscheck.errors import LayoutError
from dscheck.layout.region import Region


def byte_runs(outer: Region, inner: Region, itemsize: int) -> Iterator[tuple[int, int]]:
    """The (offset, length) ranges, in bytes and ascending, that `inner` takes of the row-major bytes of `outer`.

    Both are boxes of the same tensor. The ranges are maximal: no two of them touch; none for an empty `inner`.
    Raises LayoutError, at the call, when `inner` does not lie in `outer`.
    >>> list(byte_runs(Region((2, 0), (6, 8)), Region((3, 2), (5, 4)), itemsize=4))
    [(40, 8), (72, 8)]
    """
    if outer.ndim != inner.ndim or not outer.contains(inner):
        raise LayoutError(f"box {inner} does not lie in box {outer}")
    return _runs(outer, inner, itemsize) if inner.numel else iter(())


def _runs(outer: Region, inner: Region, itemsize: int) -> Iterator[tuple[int, int]]:
    # From the last dimension that is cut on, the bytes of a row of `inner` lie side by side.
    cut = [dim for dim in range(outer.ndim) if inner.shape[dim] != outer.shape[dim]]
    whole_from = cut[-1] if cut else 0
    strides = [math.prod(outer.shape[dim + 1 :]) * itemsize for dim in range(outer.ndim)]
    local = inner.relative_to(outer.start)
    length = math.prod(inner.shape[whole_from:]) * itemsize
    first = sum(at * stride for at, stride in zip(local.start[whole_from:], strides[whole_from:], strict=True))
    rows = (range(a * s, b * s, s) for a, b, s in zip(local.start, local.stop, strides[:whole_from], strict=False))
    for offsets in product(*rows):
        yield first + sum(offsets), length
