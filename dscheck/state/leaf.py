"""What the live state is made of once it is flattened: tensors with their regions, and plain objects."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from dscheck.state.placements import Cut, Part


@dataclass(frozen=True, slots=True)
class TensorLeaf:
    """One global tensor as this rank sees it, without its memory, which FlatState.locals has.

    `cut`: what this rank holds of it. `aliases` are further names of the same tensor (tied parameters). `owned_by` is
    weak, as leaves outlive a save: an optimizer that was replaced must not keep its state alive through them.
    """

    name: str
    dtype: str
    cut: Cut
    owned_by: weakref.ref[torch.optim.Optimizer] | None = None
    aliases: tuple[str, ...] = ()

    @property
    def owner(self) -> torch.optim.Optimizer | None:
        """The optimizer behind whose fence the tensor may be captured lazily, if there is one."""
        return None if self.owned_by is None else self.owned_by()


@dataclass(frozen=True, slots=True)
class Target:
    """Live memory that a load fills with one saved tensor: the non-empty regions that this rank holds of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


@dataclass(slots=True)
class FlatState:
    """The whole state at one moment.

    `locals`: this rank's live memory of each of `tensors`, or a copy where its bytes are not its values (a lazily
    conjugated view). `ours`: plain objects by path that should be equal on all ranks; `mine`: what belongs to this rank
    alone (RNG, `per_rank`). `options`: optimizer name → parameter name → the options of the parameter's group.
    Objects are in the tagged plain form of manifest/objects.py, some parts of it still to be made (`Later`), but from
    values taken by now: they cannot change any more.
    `mesh`: this rank's coordinate on each named dimension of the device meshes met, for the map of who held what.
    `memory`: the same object as long as all `locals` lie where they lay.
    """

    tensors: list[TensorLeaf] = field(default_factory=list)
    locals: list[torch.Tensor] = field(default_factory=list)
    ours: dict[str, Any] = field(default_factory=dict)
    mine: dict[str, Any] = field(default_factory=dict)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    mesh: tuple[tuple[str, int], ...] = ()
    memory: object = None
