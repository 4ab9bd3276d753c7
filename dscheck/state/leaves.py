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
from dscheck.state.tensors import alias, dtype_name, is_lazy_view, memory_key, refuse_unstorable


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


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's memory of a tensor: the local one of a DTensor, whatever its placements."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


@dataclass(slots=True)
class Leaves:
    """Collects tensors: the same memory cut in the same way, met again under another name, is a tie."""

    by_name: dict[str, Held] = field(default_factory=dict)
    mesh: dict[str, int] = field(default_factory=dict)
    _by_memory: dict[Any, Held] = field(default_factory=dict)
    _by_identity: dict[int, tuple[list[str], torch.Tensor, Held]] = field(default_factory=dict)
    _rewritten: set[int] = field(default_factory=set)

    def add(
        self, name: str, tensor: torch.Tensor, cut: Cut, owner: Optimizer | None = None, *, owned: bool = True
    ) -> None:
        """Take in a live tensor. `owned=False`: more than its optimizer changes it, so nothing may own it.

        Raises StateError when the name is taken, or the tensor cannot be stored.
        """
        if name in self.by_name:
            raise StateError(f"two values of the state are called '{name}': rename one of them", path=name)
        local = local_of(tensor)
        refuse_unstorable(local, name)
        lazy = is_lazy_view(local)
        self._note_mesh(tensor)
        key = (memory_key(local), cut.shape, cut.pieces)
        held = self._by_memory.get(key)
        if held is None:
            held = self._by_memory[key] = Held([name], tensor, alias(local) if lazy else local, cut, owner, lazy)
        else:
            held.names.append(name)
        self.by_name[name] = held
        self._by_identity.setdefault(id(tensor), ([], tensor, held))[0].append(name)
        if not owned:
            self._rewritten.add(id(held))

    def _note_mesh(self, tensor: torch.Tensor) -> None:
        if isinstance(tensor, DTensor) and (dims := tensor.device_mesh.mesh_dim_names):
            for dim, index in zip(dims, tensor.device_mesh.get_coordinate() or (), strict=False):
                self.mesh.setdefault(dim, index)

    def parameters(self) -> dict[int, Parameter]:
        """By identity, what an optimizer may refer to."""
        return {
            identity: Parameter(tuple(names), tensor, held.cut)
            for identity, (names, tensor, held) in self._by_identity.items()
        }

    def own(self, parameter: torch.Tensor, optimizer: Optimizer) -> None:
        """Say that `optimizer` steps `parameter`. One that two optimizers step is fenced by neither."""
        found = self._by_identity.get(id(parameter))
        if found is None or id(held := found[2]) in self._rewritten:
            return
        if held.owner is not None and held.owner is not optimizer:
            self._rewritten.add(id(held))
            held.owner = None
        else:
            held.owner = optimizer

    def held(self) -> Iterator[Held]:
        """Every tensor once, in the order in which they were met."""
        return iter(self._by_memory.values())
