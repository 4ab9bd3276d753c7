"""Putting a checkpoint back: what is matched and allocated before the first byte, and what is installed after the last."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dscheck.state.leaf import TensorLeaf
from dscheck.state.survey import Survey

Rng = Literal["exact", "equivalent", "none"]


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor of a checkpoint under one of its names; `row` is the name that its row has (None: this very name)."""

    dtype: str
    shape: tuple[int, ...]
    row: str | None = None


@dataclass(frozen=True, slots=True)
class SavedState:
    """What a checkpoint holds, as this rank sees it.

    `tensors`: by every name, aliases included. `ours`: plain objects in tagged form; on the same number of ranks this
    rank's own. `conflicted`: paths of `ours` whose saved values differ between ranks, when the number of ranks is another.
    `mine`: what a saved rank kept for itself. `options`: optimizer → parameter → tagged options. `world`: saved ranks.
    """

    tensors: Mapping[str, SavedTensor]
    ours: Mapping[str, Any]
    conflicted: frozenset[str]
    mine: Callable[[int], Mapping[str, Any]]
    options: Mapping[str, Mapping[str, Any]]
    world: int


@dataclass(slots=True)
class Restore:
    """A load that has been prepared and has changed nothing yet.

    `tensors`: the memory to fill, live or new. `missing`: live names that the checkpoint lacks. `unexpected`: saved names
    below the wanted ones for which this rank has no place; other ranks may.
    """

    tensors: tuple[TensorLeaf, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def finish(self) -> Rng:
        raise NotImplementedError


def prepare(
    found: Survey, saved: SavedState, *, rank: int, world: int, rng: bool, only: Sequence[str] | None, strict: bool
) -> Restore:
    raise NotImplementedError
