"""Optimizers: whose fence holds, which parameter has which name, and the state of each parameter as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dscheck.errors import StateError
from dscheck.state.placements import Cut, cut_of, dtensor_cut

# How a step is computed, not what: the process that runs decides.
IMPLEMENTATION = frozenset({"foreach", "fused", "capturable", "differentiable"})
# What schedulers add to a group; the same optimizer has them or not.
_SCHEDULED = frozenset({"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"})
_NOT_OPTIONS = frozenset({"params", "param_names"})


def is_optimizer(value: Any) -> bool:
    """Whether `value` is an optimizer, or wraps one; a scheduler, which also refers to one, is not."""
    if isinstance(value, Optimizer):
        return True
    return hasattr(value, "param_groups") and hasattr(value, "step") and _inner(value) is not None


def _inner(wrapper: Any) -> Optimizer | None:
    found = [
        value
        for value in getattr(wrapper, "__dict__", {}).values()
        if isinstance(value, Optimizer) and value is not wrapper
    ]
    return found[0] if len(found) == 1 else None


def unwrap(name: str, optimizer: Any) -> tuple[Optimizer, list[Any]]:
    """The torch optimizer that does the step and whose hooks work, and the wrappers that it is in, outermost first.

    Raises StateError when a wrapper keeps state of its own, which the inner one does not know, and when no hook works.
    """
    at, wrappers = optimizer, []
    while (inner := _inner(at)) is not None:
        refuse_state_of_its_own(name, at, inner)
        wrappers.append(at)
        at = inner
    try:
        at.register_step_pre_hook(_nothing).remove()
    except Exception as error:
        raise StateError(
            f"optimizer '{name}': {type(at).__name__} accepts no step hook ({error}): put the torch optimizer inside "
            "it into the state",
            path=name,
        ) from error
    return at, wrappers


def _nothing(*_: Any) -> None: ...


def refuse_state_of_its_own(name: str, wrapper: Any, inner: Optimizer) -> None:
    own = getattr(wrapper, "state", None)
    if own and own is not inner.state and any(key not in inner.state for key in own):
        raise StateError(
            f"optimizer '{name}': the wrapper {type(wrapper).__name__} keeps state beside that of the "
            f"{type(inner).__name__} inside it, and only one of them can be put back: put each into the state",
            path=name,
        )


def plain_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a group says about its step, without its parameters."""
    return {key: value for key, value in group.items() if key not in _NOT_OPTIONS}


def bare_name(optimizer: str) -> str:
    """The object with the options of an optimizer's groups without parameters, in order."""
    return f"{optimizer}.groups_without_parameters"


def own_options(options: Mapping[str, Any]) -> set[str]:
    """The names of the options that are those of the optimizer's class, or of the user."""
    return options.keys() - _NOT_OPTIONS - IMPLEMENTATION - _SCHEDULED


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter as an optimizer knows it: its names in the state, the first one canonical, and how it is cut."""

    names: tuple[str, ...]
    tensor: torch.Tensor
    cut: Cut


class NamedOptimizer:
    """An optimizer of the state with the names of its parameters. Nothing in it is ever stepped or called.

    `parameters` in the order of the groups; `groups` pairs each live group with its parameters.
    """

    def __init__(
        self, name: str, inner: Optimizer, wrappers: Sequence[Any], known: Mapping[int, Parameter], rank: int
    ) -> None:
        self.name, self.inner, self.wrappers = name, inner, wrappers
        self.groups: list[tuple[dict[str, Any], list[Parameter]]] = []
        for number, group in enumerate(inner.param_groups):
            names = group.get("param_names")
            members = []
            for index, tensor in enumerate(group["params"]):
                parameter = known.get(id(tensor))
                if parameter is None:
                    if names is None:
                        raise self._nameless(number, index, tensor)
                    parameter = Parameter((names[index],), tensor, cut_of(tensor, names[index], rank))
                members.append(parameter)
            self.groups.append((group, members))
        self.parameters = [parameter for _, members in self.groups for parameter in members]
        self._refuse_same_names()

    def _nameless(self, group: int, index: int, tensor: torch.Tensor) -> StateError:
        return StateError(
            f"optimizer '{self.name}': parameter {index} of group {group}, of shape {list(tensor.shape)}, is in no "
            f"module of the state: put its module into the state, or name it with {type(self.inner).__name__}"
            "(model.named_parameters())",
            path=self.name,
        )

    def _refuse_same_names(self) -> None:
        seen: set[str] = set()
        for parameter in self.parameters:
            if parameter.names[0] in seen:
                raise StateError(
                    f"optimizer '{self.name}' has two parameters called '{parameter.names[0]}'", path=self.name
                )
            seen.add(parameter.names[0])

    def values(self) -> Iterator[tuple[str, Parameter | None, Any]]:
        """(key, parameter, value) of all state; the parameter is None for what belongs to the whole optimizer."""
        by_identity = {id(parameter.tensor): parameter for parameter in self.parameters}
        for owner, state in self.inner.state.items():
            if not isinstance(owner, torch.Tensor):
                yield self._key(owner), None, state
            elif id(owner) in by_identity:
                for key, value in state.items():
                    yield self._key(key), by_identity[id(owner)], value
            elif state:
                raise StateError(
                    f"optimizer '{self.name}' has state for a tensor of shape {list(owner.shape)} that is in no group",
                    path=self.name,
                )

    def _key(self, key: Any) -> str:
        if not isinstance(key, str) or not key or "." in key:
            raise StateError(
                f"optimizer '{self.name}' has state under the key {key!r}: a key must be a text without a dot",
                path=self.name,
            )
        return key

    def state_name(self, key: str, parameter: Parameter | None) -> str:
        """What a value is called in a checkpoint: `<optimizer>.state.<key>.<parameter>`."""
        return f"{self.name}.state.{key}" + (f".{parameter.names[0]}" if parameter else "")

    def plain_state(self) -> Iterator[str]:
        """The names of all state that is stored as objects."""
        for key, parameter, value in self.values():
            if parameter is None or not isinstance(value, torch.Tensor):
                yield self.state_name(key, parameter)

    @property
    def bare(self) -> list[dict[str, Any]]:
        """The live groups that hold no parameter here, so that nothing but their order names their options."""
        return [group for group, members in self.groups if not members]


def state_cut(value: torch.Tensor, parameter: Parameter, path: str) -> Cut:
    """How a tensor of a parameter's state is cut: as itself, as the parameter, or whole.

    Raises StateError for a plain tensor of another shape than its sharded parameter: what it is a part of is unknown.
    """
    if isinstance(value, DTensor):
        return dtensor_cut(value, path)
    if tuple(value.shape) == parameter.cut.local_shape:
        return parameter.cut
    if value.ndim == 0:
        return parameter.cut.scalar()
    if parameter.cut.is_whole:
        return parameter.cut.whole_of(value.shape)
    raise StateError(
        f"'{path}' has shape {list(value.shape)}, its parameter '{parameter.names[0]}' holds "
        f"{list(parameter.cut.local_shape)} of {list(parameter.cut.shape)} here: only DTensors, numbers and tensors of "
        "the parameter's shape can be placed for a sharded parameter",
        path=path,
    )
