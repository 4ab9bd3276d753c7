"""The live tensors of a state by name: ties found by their memory, parameters by their identity."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dscheck.errors import StateError
from dscheck.state.leaf import Target, TensorLeaf
from dscheck.state.optimizers import Parameter
from dscheck.state.placements import Cut
from dscheck.state.tensors import (
    alias,
    dtype_name,
    is_lazy_view,
    is_wrapper,
    local_of,
    memory_key,
    refuse_unstorable,
)
from dscheck.state.wrappers import take_apart


@dataclass(slots=True)
class Held:
    """A live tensor under all its names. `local` is this rank's memory, or a copy of it for a lazy view (`copied`)."""

    names: list[str]
    tensor: torch.Tensor
    local: torch.Tensor
    cut: Cut
    owner: Optimizer | None = None
    copied: bool = False

    @property
    def name(self) -> str:
        return self.names[0]

    def leaf(self) -> TensorLeaf:
        owned_by = None if self.owner is None else weakref.ref(self.owner)
        return TensorLeaf(self.name, self._dtype, self.cut, owned_by, tuple(self.names[1:]))

    def target(self, name: str) -> Target:
        """What a load fills with the saved tensor `name`."""
        return Target(name, self._dtype, self.cut.shape, self.cut.parts(self.local))

    @property
    def _dtype(self) -> str:
        return dtype_name(self.local.dtype, self.name)


@dataclass(slots=True)
class Known:
    """One tensor object that was met: its names, its cut, and its memory, which is several tensors for a wrapper."""

    names: list[str]
    tensor: torch.Tensor
    cut: Cut
    held: list[Held]
    described: Any = None
    """The stored description of a wrapper."""


@dataclass(slots=True)
class Leaves:
    """Collects tensors: the same memory cut in the same way, met again under another name, is a tie."""

    mesh: dict[str, int] = field(default_factory=dict)
    _by_memory: dict[Any, Held] = field(default_factory=dict)
    _by_identity: dict[int, Known] = field(default_factory=dict)
    _names: set[str] = field(default_factory=set)
    _rewritten: set[int] = field(default_factory=set)

    def add(
        self, name: str, tensor: torch.Tensor, cut: Cut, owner: Optimizer | None = None, *, owned: bool = True
    ) -> None:
        """Take in a live tensor. `owned=False`: more than its optimizer changes it, so nothing may own it.

        Raises StateError when the name is taken, or the tensor cannot be stored.
        """
        self._take_name(name)
        self._note_mesh(tensor)
        described = None
        if is_wrapper(local_of(tensor)):
            apart = take_apart(tensor, cut, name)
            described, held = apart.described, []
            for attribute, (inner, inner_cut) in apart.inner.items():
                self._take_name(f"{name}.{attribute}")
                held.append(self._hold(f"{name}.{attribute}", inner, inner_cut, owner))
        else:
            held = [self._hold(name, tensor, cut, owner)]
        self._by_identity.setdefault(id(tensor), Known([], tensor, cut, held, described)).names.append(name)
        if not owned:
            self._rewritten.update(map(id, held))

    def _take_name(self, name: str) -> None:
        if name in self._names:
            raise StateError(f"two values of the state are called '{name}': rename one of them", path=name)
        self._names.add(name)

    def _hold(self, name: str, tensor: torch.Tensor, cut: Cut, owner: Optimizer | None) -> Held:
        local = local_of(tensor)
        refuse_unstorable(local, name)
        lazy = is_lazy_view(local)
        key = (memory_key(local), cut.shape, cut.pieces)
        held = self._by_memory.get(key)
        if held is None:
            held = self._by_memory[key] = Held([name], tensor, alias(local) if lazy else local, cut, owner, lazy)
        else:
            held.names.append(name)
        return held

    def _note_mesh(self, tensor: torch.Tensor) -> None:
        if isinstance(tensor, DTensor) and (dims := tensor.device_mesh.mesh_dim_names):
            for dim, index in zip(dims, tensor.device_mesh.get_coordinate() or (), strict=False):
                self.mesh.setdefault(dim, index)

    def parameters(self) -> dict[int, Parameter]:
        """By identity, what an optimizer may refer to."""
        return {
            identity: Parameter(tuple(known.names), known.tensor, known.cut)
            for identity, known in self._by_identity.items()
        }

    def own(self, parameter: torch.Tensor, optimizer: Optimizer) -> None:
        """Say that `optimizer` steps `parameter`. One that two optimizers step is fenced by neither."""
        known = self._by_identity.get(id(parameter))
        for held in known.held if known is not None else ():
            if id(held) in self._rewritten:
                continue
            if held.owner is not None and held.owner is not optimizer:
                self._rewritten.add(id(held))
                held.owner = None
            else:
                held.owner = optimizer

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor object that was met, each once."""
        return (known.tensor for known in self._by_identity.values())

    def held(self) -> Iterator[Held]:
        """Every tensor once, in the order in which they were met."""
        return iter(self._by_memory.values())

    def wrappers(self) -> Iterator[Known]:
        """What was taken apart: its description is to be saved beside its inner tensors, and compared at load."""
        return (known for known in self._by_identity.values() if known.described is not None)
