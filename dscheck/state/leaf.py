"""What the live state is made of once it is flattened: tensors with their regions, and plain objects."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

from dscheck.layout.region import Region


@dataclass(frozen=True, slots=True)
class Part:
    """One region of a global tensor and the live memory that holds it: an alias, and `view.shape == region.shape`."""

    region: Region
    view: torch.Tensor


class Proof(Enum):
    """Why `holders` of a leaf hold the same bytes (invariant C14)."""

    MESH = "mesh"  # a DTensor's device mesh, or DDP's process group: shares of it may be written by different ranks
    CLAIM = "claim"  # nothing but the name: one rank writes it whole, after equal samples
    FIRST = "first"  # one rank is authoritative (buffers under DDP): the others only load it


@dataclass(frozen=True, slots=True)
class TensorLeaf:
    """One global tensor as this rank sees it.

    `parts` are the non-empty regions that this rank holds, each with its live view; `holders` the global ranks, sorted,
    that provably hold the same parts (this rank alone under Proof.CLAIM; under Proof.FIRST the one rank whose bytes
    count, perhaps another). `owner` is the optimizer behind whose fence the tensor may be captured lazily, or None.
    `aliases` are further names of the same tensor (tied parameters).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    holders: tuple[int, ...]
    proof: Proof
    owner: torch.optim.Optimizer | None = None
    aliases: tuple[str, ...] = ()


@dataclass(slots=True)
class FlatState:
    """The whole state at one moment.

    `ours`: plain objects by path that should be equal on all ranks; `mine`: what belongs to this rank alone (RNG,
    `per_rank`). `options`: optimizer name → parameter name → the options of the parameter's group.
    Objects are already in the tagged plain form of manifest/objects.py, so they cannot change any more.
    `mesh`: this rank's coordinate on each named dimension of the device meshes met, for the map of who held what.
    """

    tensors: list[TensorLeaf] = field(default_factory=list)
    ours: dict[str, Any] = field(default_factory=dict)
    mine: dict[str, Any] = field(default_factory=dict)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    mesh: tuple[tuple[str, int], ...] = ()
