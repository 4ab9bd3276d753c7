"""From a survey to a flattened state: tensors by name, and the tagged form of all else."""

from __future__ import annotations

from typing import Any

import torch

from dscheck.errors import StateError
from dscheck.state.leaf import FlatState
from dscheck.state.objects import Lift, encode, tensors_in
from dscheck.state.optimizers import NamedOptimizer, Parameter, state_cut
from dscheck.state.options import put_options
from dscheck.state.placements import cut_of
from dscheck.state.survey import Survey


class Flattening:
    """Fills `flat` with what `found` says of the live state.

    `is_fleeting`: some tensors are only what an object gave when it was read, or copies of lazy views, so that the next
    save must do all of it again.
    """

    def __init__(self, found: Survey, flat: FlatState, rank: int) -> None:
        self._found, self._leaves, self._flat, self._rank = found, found.leaves, flat, rank
        self.is_fleeting = False

    def everything(self) -> dict[str, Any]:
        """Returns what of the objects follows from the tensors alone."""
        for optimizer in self._found.optimizers:
            self._optimizer(optimizer)
        for name, slot in self._found.objects.items():
            alone = name in self._found.per_rank
            lift = self._lift(f"@rank{self._rank}" if alone else "")
            (self._flat.mine if alone else self._flat.ours)[name] = encode(slot.read(), name, lift)
        described = self._descriptions()
        self._flat.ours |= described
        held = list(self._leaves.held())
        self._flat.tensors, self._flat.locals = [item.leaf() for item in held], [item.local for item in held]
        self._flat.mesh = tuple(self._leaves.mesh.items())
        self.is_fleeting = self.is_fleeting or any(item.copied for item in held)
        return described

    def _optimizer(self, optimizer: NamedOptimizer) -> None:
        for key, parameter, value in optimizer.values():
            name = optimizer.state_name(key, parameter)
            if parameter is not None and isinstance(value, torch.Tensor):
                self._leaves.add(name, value, state_cut(value, parameter, name), optimizer.inner)
            else:
                self._flat.ours[name] = encode(value, name, self._lift_state(optimizer, parameter, value, name))
        groups = ((group, [member.names[0] for member in members]) for group, members in optimizer.groups)
        put_options(self._flat, optimizer.name, groups)

    def _descriptions(self) -> dict[str, Any]:
        """What the wrappers in the state are, by name."""
        found = {name: known.described for known in self._leaves.wrappers() for name in known.names}
        if taken := next((name for name in found if name in self._flat.ours), None):
            raise StateError(f"two values of the state are called '{taken}': rename one of them", path=taken)
        return found

    def _lift(self, suffix: str) -> Lift:
        def lift(at: str, tensor: torch.Tensor) -> str:
            self.is_fleeting = True
            self._leaves.add(at + suffix, tensor, cut_of(tensor, at, self._rank))
            return at + suffix

        return lift

    def _lift_state(self, optimizer: NamedOptimizer, parameter: Parameter | None, value: Any, name: str) -> Lift:
        """Tensors nested in a parameter's state (LBFGS) are whole, or refused."""
        if parameter is not None and not parameter.cut.is_whole:
            for at, tensor in tensors_in(value, name).items():
                self.is_fleeting = True
                state_cut(tensor, parameter, at)

        def lift(at: str, tensor: torch.Tensor) -> str:
            self.is_fleeting = True
            cut = state_cut(tensor, parameter, at) if parameter else cut_of(tensor, at, self._rank)
            self._leaves.add(at, tensor, cut, optimizer.inner)
            return at

        return lift
