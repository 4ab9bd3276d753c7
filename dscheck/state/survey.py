"""A walk over the live mapping: which tensors, optimizers and plain objects it holds now, and under which names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from dscheck.errors import StateError
from dscheck.state.boxes import PerRank, Sharded
from dscheck.state.leaves import Leaves
from dscheck.state.modules import read_module
from dscheck.state.optimizers import NamedOptimizer, is_optimizer, unwrap
from dscheck.state.placements import cut_of
from dscheck.state.slots import Put, Slot, called, is_stateful, mapping_put, slot_of

_STANDING_ALONE = (
    torch.Tensor,
    Sharded,
    PerRank,
    nn.Module,
    torch.Generator,
    np.random.Generator,
    np.random.RandomState,
)
RESERVED = "dscheck"


@dataclass(slots=True)
class Survey:
    """The live state at one moment. `tops` are the names of the mapping.

    What is `per_rank` is in `objects` as well, and so is the extra state of modules, which `extra` has by its name.
    """

    leaves: Leaves = field(default_factory=Leaves)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    optimizers: list[NamedOptimizer] = field(default_factory=list)
    objects: dict[str, Slot] = field(default_factory=dict)
    per_rank: dict[str, PerRank] = field(default_factory=dict)
    extra: dict[str, nn.Module] = field(default_factory=dict)
    tops: tuple[str, ...] = ()

    def tensors(self) -> Iterator[torch.Tensor]:
        """All live tensors that the names and cuts depend on: the state's, and parameters known to optimizers only."""
        yield from self.leaves.tensors()
        for optimizer in self.optimizers:
            yield from (parameter.tensor for parameter in optimizer.parameters)


def survey(mapping: Mapping[str, Any], rank: int) -> Survey:
    """What `mapping` holds. Reads no tensor, calls no collective and no optimizer.

    Raises StateError, by path, for what cannot be stored, or be put back.
    """
    walk = _Walk(rank)
    for name, value in mapping.items():
        walk.visit(_checked_name(name), value, mapping_put(mapping, name))
    return walk.finished(tuple(mapping))


def _checked_name(name: Any) -> str:
    if not isinstance(name, str) or not name or name == RESERVED or name.startswith(f"{RESERVED}."):
        raise StateError(
            f"the state has the name {name!r}: names are texts, not empty, and '{RESERVED}' is taken", path=str(name)
        )
    return name


class _Walk:
    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._found = Survey()
        self._optimizers: dict[str, tuple[torch.optim.Optimizer, list[Any]]] = {}
        self._open: set[int] = set()

    def visit(self, name: str, value: Any, put: Put | None) -> None:
        if isinstance(value, PerRank):
            self._per_rank(name, value)
        elif isinstance(value, Sharded):
            self._found.leaves.add(name, value.local, value.cut(self._rank))
        elif isinstance(value, nn.Module):
            self._module(name, value)
        elif is_optimizer(value):
            self._optimizers[name] = unwrap(name, value)
        elif isinstance(value, torch.Tensor):
            self._found.leaves.add(name, value, cut_of(value, name, self._rank))
        elif holds_more_than_data(value):
            self._container(name, value)
        else:
            self._object(slot_of(name, value, put))

    def finished(self, tops: tuple[str, ...]) -> Survey:
        """Optimizers come last: their parameters may lie anywhere in the mapping."""
        leaves = self._found.leaves
        known = leaves.parameters()
        for name, (inner, wrappers) in self._optimizers.items():
            optimizer = NamedOptimizer(name, inner, wrappers, known, self._rank)
            for parameter in optimizer.parameters:
                leaves.own(parameter.tensor, inner)
            self._found.optimizers.append(optimizer)
        self._found.tops = tops
        return self._found

    def _module(self, name: str, module: nn.Module) -> None:
        self._found.modules[name] = module
        state = read_module(name, module, self._rank)
        for entry in state.tensors:
            self._found.leaves.add(entry.name, entry.tensor, entry.cut, owned=entry.owned)
        for path, (child, value) in state.extra.items():
            write = partial(called, path, f"{type(child).__name__}.set_extra_state()", child.set_extra_state)
            self._found.extra[path] = child
            self._object(Slot(path, partial(_given, value), write))

    def _per_rank(self, name: str, box: PerRank) -> None:
        def put(value: Any) -> None:
            box.value = value

        self._found.per_rank[name] = box
        self._object(slot_of(name, box.value, put))

    def _container(self, name: str, value: Any) -> None:
        if id(value) in self._open:
            raise StateError(f"'{name}' contains itself", path=name)
        self._open.add(id(value))
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            if isinstance(value, Mapping) and not isinstance(key, str):
                raise StateError(
                    f"'{name}' holds tensors or objects under the key {key!r}: use a text, a part of their names",
                    path=name,
                )
            self.visit(f"{name}.{key}", item, mapping_put(value, key))
        self._open.discard(id(value))

    def _object(self, slot: Slot) -> None:
        if slot.name in self._found.objects:
            raise StateError(f"two values of the state are called '{slot.name}': rename one of them", path=slot.name)
        self._found.objects[slot.name] = slot


def _given(value: Any) -> Any:
    return value


def holds_more_than_data(value: Any, depth: int = 0) -> bool:
    """Whether a container has something inside that stands for itself: a tensor, a module, a loader."""
    if not isinstance(value, Mapping | list | tuple) or is_stateful(value):
        return depth > 0 and (isinstance(value, _STANDING_ALONE) or is_stateful(value) or is_optimizer(value))
    if depth > 100:
        return False
    items = value.values() if isinstance(value, Mapping) else value
    return any(holds_more_than_data(item, depth + 1) for item in items)
