"""The live state as a whole: flattened for a save, and prepared for a load that fills it in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dscheck.errors import ConfigError, StateError
from dscheck.manifest.objects import encode_object
from dscheck.state import rng as streams
from dscheck.state.leaf import FlatState
from dscheck.state.leaves import Leaves
from dscheck.state.objects import Lift, encode, tensors_in, to_array
from dscheck.state.optimizers import NamedOptimizer, Parameter, plain_options, state_cut
from dscheck.state.placements import cut_of
from dscheck.state.restore import Restore, prepare
from dscheck.state.saved import SavedState, SavedTensor
from dscheck.state.survey import Survey, survey

__all__ = ["LiveState", "Restore", "SavedState", "SavedTensor"]


class LiveState:
    """The user's mapping, held by reference and read anew each time: what is put into it later is part of the state."""

    def __init__(self, mapping: Mapping[str, Any], *, rank: int, world: int, rng: bool = True) -> None:
        if not isinstance(mapping, Mapping):
            raise ConfigError(f"the state is a mapping of names to what is to be saved, not a {type(mapping).__name__}")
        if not 0 <= rank < world:
            raise ConfigError(f"rank {rank} is not one of {world} ranks")
        self.mapping, self.rank, self.world, self.rng = mapping, rank, world, rng

    def survey(self) -> Survey:
        """Names, tensors, optimizers and objects as they are now. Raises StateError for what cannot be stored."""
        return survey(self.mapping, self.rank)

    def flatten(self) -> FlatState:
        """The state at this moment: tensors as views of live memory, all else as values that cannot change any more.

        No collective, no optimizer step, nothing resharded. Raises StateError by path.
        """
        flat = FlatState()
        if self.rng:
            flat.mine[streams.KEY] = encode_object(streams.capture(), streams.KEY)
        found = self.survey()
        for optimizer in found.optimizers:
            _flatten_optimizer(optimizer, found.leaves, flat, self.rank)
        for name, slot in found.objects.items():
            alone = name in found.per_rank
            lift = _lift(found.leaves, self.rank, f"@rank{self.rank}" if alone else "")
            (flat.mine if alone else flat.ours)[name] = encode(slot.read(), name, lift)
        flat.ours |= _descriptions(found.leaves, flat)
        flat.tensors = [held.leaf() for held in found.leaves.held()]
        flat.locals = [held.local for held in found.leaves.held()]
        flat.mesh = tuple(found.leaves.mesh.items())
        return flat

    def prepare(self, saved: SavedState, only: Sequence[str] | None = None, strict: bool = True) -> Restore:
        """See `Restore`. Touches nothing live."""
        return prepare(self.survey(), saved, rank=self.rank, world=self.world, rng=self.rng, only=only, strict=strict)


def _descriptions(leaves: Leaves, flat: FlatState) -> dict[str, Any]:
    """What the wrappers in the state are, by name."""
    found = {name: known.described for known in leaves.wrappers() for name in known.names}
    if taken := next((name for name in found if name in flat.ours), None):
        raise StateError(f"two values of the state are called '{taken}': rename one of them", path=taken)
    return found


def _lift(leaves: Leaves, rank: int, suffix: str = "") -> Lift:
    def lift(at: str, tensor: torch.Tensor) -> str:
        leaves.add(at + suffix, tensor, cut_of(tensor, at, rank))
        return at + suffix

    return lift


def _flatten_optimizer(optimizer: NamedOptimizer, leaves: Leaves, flat: FlatState, rank: int) -> None:
    for key, parameter, value in optimizer.values():
        name = optimizer.state_name(key, parameter)
        if parameter is not None and isinstance(value, torch.Tensor):
            leaves.add(name, value, state_cut(value, parameter, name), optimizer.inner)
        else:
            flat.ours[name] = encode(value, name, _lift_state(optimizer, parameter, leaves, value, name, rank))
    options = flat.options[optimizer.name] = {}
    for group, members in optimizer.options():
        encoded = encode_object(group, f"{optimizer.name}.options", to_array)
        options.update({parameter.names[0]: encoded for parameter in members})
    if optimizer.bare:
        name = optimizer.bare_name
        flat.ours[name] = [encode_object(plain_options(group), name, to_array) for group in optimizer.bare]


def _lift_state(
    optimizer: NamedOptimizer, parameter: Parameter | None, leaves: Leaves, value: Any, name: str, rank: int
) -> Lift:
    """Tensors nested in a parameter's state (LBFGS) are whole, or refused."""
    if parameter is not None and not parameter.cut.is_whole:
        for at, tensor in tensors_in(value, name).items():
            state_cut(tensor, parameter, at)

    def lift(at: str, tensor: torch.Tensor) -> str:
        cut = state_cut(tensor, parameter, at) if parameter else cut_of(tensor, at, rank)
        leaves.add(at, tensor, cut, optimizer.inner)
        return at

    return lift
