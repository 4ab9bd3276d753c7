"""Boxes of a global tensor, and nothing else: integers, half-open, frozen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dscheck.errors import LayoutError


@dataclass(frozen=True, slots=True, order=True)
class Region:
    """A half-open N-D box in element indices of a global tensor, one pair a dimension. A 0-d tensor has one element.

    Raises LayoutError when the bounds are negative, reversed or of different length. Source: docs/format.md F7.
    >>> Region((0, 4), (8, 8)).shape
    (8, 4)
    """

    start: tuple[int, ...]
    stop: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.start) != len(self.stop):
            raise LayoutError(f"a region needs as many starts as stops: {self.start} and {self.stop}")
        if any(a < 0 or b < a for a, b in zip(self.start, self.stop, strict=True)):
            raise LayoutError(f"a region needs 0 <= start <= stop in each dimension: {self.start} to {self.stop}")

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Region:
        """The box that covers a tensor of `shape`."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def ndim(self) -> int:
        return len(self.start)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def intersect(self, other: Region) -> Region | None:
        """The box both regions share, or None when they only touch or miss.

        Raises LayoutError when they differ in ndim. Source: docs/format.md F7.
        >>> Region((0, 4), (8, 8)).intersect(Region((6, 0), (10, 6)))
        Region(start=(6, 4), stop=(8, 6))
        """
        if self.ndim != other.ndim:
            raise LayoutError(f"regions of {self.ndim} and {other.ndim} dimensions have nothing to share")
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        return None if any(a >= b for a, b in zip(start, stop, strict=True)) else Region(start, stop)

    def contains(self, other: Region) -> bool:
        """Whether every element of `other` lies in this box; an empty box lies in any that its bounds lie in."""
        return all(map(int.__le__, self.start, other.start)) and all(map(int.__le__, other.stop, self.stop))

    def relative_to(self, origin: Sequence[int]) -> Region:
        """The same box in the indices of a box that starts at `origin`.

        >>> Region((6, 4), (8, 6)).relative_to((6, 0))
        Region(start=(0, 4), stop=(2, 6))
        """
        return Region(
            tuple(a - o for a, o in zip(self.start, origin, strict=True)),
            tuple(b - o for b, o in zip(self.stop, origin, strict=True)),
        )

    def shift(self, offset: Sequence[int]) -> Region:
        """The same box moved by `offset`, the inverse of `relative_to`."""
        return self.relative_to(tuple(-o for o in offset))

    def slices(self) -> tuple[slice, ...]:
        """The box as an index for NumPy or torch."""
        return tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True))

    def __str__(self) -> str:
        return "[" + ", ".join(f"{a}:{b}" for a, b in zip(self.start, self.stop, strict=True)) + "]"
