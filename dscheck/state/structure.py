"""What a flatten found, kept so that the next one looks at the state natively instead of walking over it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dscheck.native import Memory, Standing, look
from dscheck.state.leaf import FlatState, TensorLeaf
from dscheck.state.objects import encode
from dscheck.state.optimizers import NamedOptimizer, is_optimizer, refuse_state_of_its_own
from dscheck.state.options import put_options
from dscheck.state.slots import called, slot_of
from dscheck.state.survey import Survey, holds_more_than_data
from dscheck.state.tensors import is_lazy_view, plain_locals


class _OtherStructureError(Exception):
    """A value has become a thing that stands for itself."""


Read = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True, slots=True)
class Structure:
    """The tensors of one flatten with their memory, and, unless `roots` is None, how to tell that they are the same.

    Keeps no tensor, module or optimizer alive. `state`: names of what optimizers hold beside tensors. `objects`: how
    the others are read from what a look at `roots` finds; True for those of this rank alone. `suspects`: the tensors
    that could become lazy views, which their memory does not show. `constant`: stored forms that the structure fixes.
    """

    tensors: list[TensorLeaf]
    mesh: tuple[tuple[str, int], ...]
    memory: Memory
    roots: list[Standing] | None
    state: tuple[str, ...]
    optimizers: tuple[KnownOptimizer, ...]
    objects: tuple[tuple[str, bool, Read], ...]
    constant: dict[str, Any]
    suspects: tuple[int, ...]

    @classmethod
    def of(cls, flat: FlatState, found: Survey, roots: list[Standing] | None, constant: dict[str, Any]) -> Structure:
        own = {id(local) for local in flat.locals}
        others = {id(local): local for tensor in found.tensors() for local in plain_locals(tensor)}
        suspects = (i for i, local in enumerate(flat.locals) if local.is_complex() or not local.is_contiguous())
        return cls(
            flat.tensors,
            flat.mesh,
            Memory([*flat.locals, *(local for key, local in others.items() if key not in own)]),
            roots,
            tuple(name for optimizer in found.optimizers for name in optimizer.plain_state()),
            tuple(map(KnownOptimizer.of, found.optimizers)),
            tuple((name, name in found.per_rank, _reader(name, found)) for name in found.objects),
            constant,
            tuple(suspects),
        )

    def is_like(self, other: Structure) -> bool:
        """Whether both have the same leaves, lying in memory in the same way, wherever that is."""
        return self.mesh == other.mesh and self.tensors == other.tensors and self.memory.is_like(other.memory)

    def flatten(self, flat: FlatState) -> bool:
        """Fill `flat` with the state as it is now; False, and `flat` is spoilt, if it has another structure by now."""
        values = None if self.roots is None else look(self.roots)
        locals_ = None if values is None else self.memory.tensors()
        if values is None or locals_ is None or any(is_lazy_view(locals_[index]) for index in self.suspects):
            return False
        try:
            flat.ours.update((name, encode(values[name], name, _refuse_lift)) for name in self.state)
            for optimizer in self.optimizers:
                optimizer.put_options(flat)
            for name, alone, read in self.objects:
                (flat.mine if alone else flat.ours)[name] = encode(read(values), name, _refuse_lift)
        except _OtherStructureError:
            return False
        flat.ours |= self.constant
        flat.tensors, flat.locals, flat.mesh = self.tensors, locals_[: len(self.tensors)], self.mesh
        flat.memory = self.memory
        return True


def _refuse_lift(at: str, tensor: torch.Tensor) -> str:
    raise _OtherStructureError


@dataclass(frozen=True, slots=True)
class KnownOptimizer:
    """An optimizer with the names of the parameters in each of its groups, and the wrappers that it is in."""

    name: str
    inner: weakref.ref[Optimizer]
    wrappers: tuple[weakref.ref[Any], ...]
    groups: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, optimizer: NamedOptimizer) -> KnownOptimizer:
        groups = tuple(tuple(parameter.names[0] for parameter in members) for _, members in optimizer.groups)
        wrappers = tuple(map(weakref.ref, optimizer.wrappers))
        return cls(optimizer.name, weakref.ref(optimizer.inner), wrappers, groups)

    def put_options(self, flat: FlatState) -> None:
        inner = self.inner()
        if inner is None:
            raise _OtherStructureError
        for wrapper in self.wrappers:
            refuse_state_of_its_own(self.name, wrapper(), inner)
        put_options(flat, self.name, zip(inner.param_groups, self.groups, strict=True))


def _reader(name: str, found: Survey) -> Read:
    """How an object is read: from its module, or from the value that a look finds in the mapping."""
    if name in found.extra:
        return partial(_read_extra, name, weakref.ref(found.extra[name]))
    return partial(_read_slot, name, name in found.per_rank)


def _read_extra(name: str, module: weakref.ref[nn.Module], values: dict[str, Any]) -> Any:
    child = module()
    if child is None:
        raise _OtherStructureError
    return called(name, f"{type(child).__name__}.get_extra_state()", child.get_extra_state)


def _read_slot(name: str, alone: bool, values: dict[str, Any]) -> Any:
    value = values[name]
    if not alone and (holds_more_than_data(value) or is_optimizer(value)):
        raise _OtherStructureError
    return slot_of(name, value, _keep).read()


def _keep(value: Any) -> None: ...
