"""Flat ranges of a flattened tensor, as ZeRO, FSDP1 and Megatron's optimizer cut it, turned into boxes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from dscheck.errors import LayoutError
from dscheck.layout.region import Region


def flat_range_boxes(shape: Sequence[int], start: int, stop: int) -> tuple[Region, ...]:
    """The boxes, in flat order, that tile elements [start, stop) of the row-major flattened tensor.

    At most 2 * ndim - 1 of them, 1 for a 0-d tensor, none for an empty range. Raises LayoutError when the range does
    not lie in the tensor.
    >>> [str(box) for box in flat_range_boxes((4, 5), 3, 17)]
    ['[0:1, 3:5]', '[1:3, 0:5]', '[3:4, 0:2]']
    """
    if not 0 <= start <= stop <= math.prod(shape):
        raise LayoutError(
            f"flat range [{start}, {stop}) does not lie in the {math.prod(shape)} elements of shape {tuple(shape)}"
        )
    return tuple(_boxes((), tuple(shape), start, stop))


def _boxes(row: tuple[int, ...], shape: tuple[int, ...], start: int, stop: int) -> Iterator[Region]:
    """The boxes of a range within one row, `row` being its indices and `shape` the dimensions that it still has."""
    if start == stop:
        return
    if not shape:
        yield Region(row, tuple(i + 1 for i in row))
        return
    size = math.prod(shape[1:])
    first_whole, last_whole = -(-start // size), stop // size
    if first_whole > last_whole:  # the range begins and ends inside the same row
        yield from _boxes((*row, last_whole), shape[1:], start - last_whole * size, stop - last_whole * size)
        return
    if start < first_whole * size:
        yield from _boxes((*row, first_whole - 1), shape[1:], start - (first_whole - 1) * size, size)
    if first_whole < last_whole:
        end = (*(i + 1 for i in row), last_whole, *shape[1:])
        yield Region((*row, first_whole) + (0,) * (len(shape) - 1), end)
    yield from _boxes((*row, last_whole), shape[1:], 0, stop - last_whole * size)
