"""What a user declares by hand: a shard of a global tensor, and what belongs to one rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from torch.distributed.tensor import DTensor

from dscheck.errors import ConfigError, LayoutError
from dscheck.layout.region import Region
from dscheck.state.placements import Cut, box, flat_range

OnReshard = Callable[[list[Any], int, int], Any] | Literal["first", "drop"] | None
"""Given all saved values in rank order, this rank and the number of ranks, what this rank loads."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Sharded:
    """A piece of a global tensor that this rank holds in `local`. Made by `sharded`, which has checked it."""

    local: torch.Tensor
    global_shape: tuple[int, ...]
    offset: tuple[int, ...] | None
    flat_range: tuple[int, int] | None

    def cut(self, rank: int) -> Cut:
        local_shape = tuple(self.local.shape)
        if self.flat_range is not None:
            return flat_range(self.global_shape, *self.flat_range, local_shape, rank)
        assert self.offset is not None
        return box(self.global_shape, self.offset, local_shape, rank)


@dataclass(slots=True, eq=False, weakref_slot=True)
class PerRank:
    """A value that belongs to this rank alone. Made by `per_rank`. A load may replace `value` when it is plain data."""

    value: Any
    on_reshard: OnReshard = None


def sharded(
    local: torch.Tensor,
    global_shape: Sequence[int],
    offset: Sequence[int] | None = None,
    *,
    flat_range: tuple[int, int] | None = None,
) -> Sharded:
    """Declare `local` as the box of a global tensor that starts at `offset`, or as a range of it once flattened.

    In elements. With `flat_range=(start, stop)` it is contiguous and of any shape that has stop - start elements.
    Raises ConfigError or LayoutError when the piece does not fit.
    >>> sharded(torch.zeros(2, 4), (8, 4), (6, 0)).offset
    (6, 0)
    """
    if not isinstance(local, torch.Tensor) or isinstance(local, DTensor):
        raise ConfigError(f"sharded() takes a plain tensor, this is a {type(local).__name__}")
    if (offset is None) == (flat_range is None):
        raise ConfigError("sharded() takes either an offset or flat_range=(start, stop)")
    shape = tuple(int(size) for size in global_shape)
    if any(size < 0 for size in shape):
        raise LayoutError(f"sharded(): a global shape has no negative sizes: {list(shape)}")
    if flat_range is not None:
        return Sharded(local, shape, None, _checked_range(local, shape, flat_range))
    assert offset is not None
    return Sharded(local, shape, _checked_offset(local, shape, tuple(int(at) for at in offset)), None)


def _checked_offset(local: torch.Tensor, shape: tuple[int, ...], offset: tuple[int, ...]) -> tuple[int, ...]:
    if not local.ndim == len(shape) == len(offset) or any(at < 0 for at in offset):
        raise LayoutError(
            f"sharded(): a local tensor of shape {list(local.shape)} at offset {list(offset)} is no box of "
            f"{list(shape)}: all three need one entry a dimension, and no negative ones"
        )
    if not Region.whole(shape).contains(Region.whole(tuple(local.shape)).shift(offset)):
        raise LayoutError(
            f"sharded(): {list(local.shape)} at offset {list(offset)} ends outside the global shape {list(shape)}"
        )
    return offset


def _checked_range(local: torch.Tensor, shape: tuple[int, ...], flat: tuple[int, int]) -> tuple[int, int]:
    start, stop = (int(at) for at in flat)
    if not 0 <= start <= stop <= prod(shape):
        raise LayoutError(
            f"sharded(): flat_range ({start}, {stop}) lies outside the {prod(shape)} elements of {list(shape)}"
        )
    if local.numel() != stop - start or not local.is_contiguous():
        raise LayoutError(
            f"sharded(): flat_range ({start}, {stop}) needs a contiguous tensor of {stop - start} elements, this one "
            f"has {local.numel()}{'' if local.is_contiguous() else ' and strides ' + str(local.stride())}"
        )
    return start, stop


def per_rank(value: Any, on_reshard: OnReshard = None) -> PerRank:
    """Declare that every rank has a value of its own here, which only the same rank may get back.

    On another number of ranks a load raises StateMismatchError, unless `on_reshard` says what then: "first" gives all
    ranks the first one's, "drop" leaves the live value as it is, a callable makes this rank's value of all saved ones.
    """
    if on_reshard not in (None, "first", "drop") and not callable(on_reshard):
        raise ConfigError(f'per_rank(): on_reshard is a callable, "first" or "drop", not {on_reshard!r}')
    if isinstance(value, PerRank | Sharded | DTensor | torch.nn.Module | torch.optim.Optimizer):
        raise ConfigError(
            f"per_rank() takes plain data, plain tensors and objects with a state_dict, not a {type(value).__name__}: "
            "give modules and optimizers a name of their own on each rank"
        )
    return PerRank(value, on_reshard)
