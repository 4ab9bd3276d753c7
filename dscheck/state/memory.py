"""Memory for saved tensors that have no live one yet: optimizer state before the first step, tensors in objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch.distributed.tensor import DTensor, Replicate

from dscheck.errors import CorruptCheckpointError, StateError
from dscheck.state.leaf import Target
from dscheck.state.optimizers import Parameter, state_cut
from dscheck.state.overlap import is_fillable
from dscheck.state.placements import Cut, cut_of
from dscheck.state.saved import Match, SavedTensor
from dscheck.state.tensors import dtype_name, is_wrapper, local_of, refuse_unstorable, torch_dtype


def target_of(name: str, tensor: torch.Tensor, cut: Cut) -> Target:
    """What load fills: `tensor`, which holds its values in its own bytes, under the saved name `name`."""
    local = local_of(tensor)
    refuse_unstorable(local, name)
    return Target(name, dtype_name(local.dtype, name), cut.shape, cut.parts(local))


def fresh_state(name: str, key: str, saved: SavedTensor, parameter: Parameter, *, on_device: bool) -> torch.Tensor:
    """New memory for a tensor of a parameter's state, of the saved dtype, as torch's optimizers make it themselves.

    Of the parameter's shape: placed like the parameter. A "step" lies on the CPU unless `on_device` (capturable or
    fused optimizers), any other number on the parameter's device. Else whole, replicated for a DTensor. Raises
    StateError where a hand-made shard leaves open what to make.
    """
    dtype, like = torch_dtype(saved.dtype), parameter.tensor.detach()
    if not saved.shape and key == "step":
        return torch.empty((), dtype=dtype, device=local_of(like).device if on_device else "cpu")
    if saved.shape == parameter.cut.shape and not is_wrapper(local_of(like)):
        return torch.empty_like(like, dtype=dtype)
    whole = torch.empty(saved.shape, dtype=dtype, device=local_of(like).device)
    if not saved.shape:
        return whole
    if isinstance(like, DTensor) and (parameter.cut.is_whole or saved.shape != parameter.cut.shape):
        mesh = like.device_mesh
        return DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    if parameter.cut.is_whole:
        return whole
    raise StateError(
        f"'{name}' of shape {list(saved.shape)} cannot be placed: its parameter '{parameter.names[0]}' of shape "
        f"{list(parameter.cut.shape)} is sharded by hand or wraps other tensors, and no live state shows how the "
        "optimizer keeps it: let it step once before the load",
        path=name,
    )


@dataclass(slots=True)
class References:
    """Gives stored objects the tensors that they refer to: live memory of the same shape and dtype, or new."""

    match: Match
    rank: int
    _given: dict[str, torch.Tensor] = field(default_factory=dict)

    def finder(
        self, live: Mapping[str, torch.Tensor], device: torch.device | None = None, parameter: Parameter | None = None
    ) -> Callable[[str], torch.Tensor]:
        """A function from a saved name to its memory; `live` are the tensors of the live object by the same names."""

        def find(name: str) -> torch.Tensor:
            if name not in self._given:
                self._given[name] = self._provide(name, live.get(name), device, parameter)
            return self._given[name]

        return find

    def _provide(
        self, name: str, live: torch.Tensor | None, device: torch.device | None, parameter: Parameter | None
    ) -> torch.Tensor:
        saved = self.match.saved.tensors.get(name)
        if saved is None:
            raise CorruptCheckpointError(
                f"an object refers to the tensor '{name}', which the checkpoint lacks", path=name
            )
        dtype = torch_dtype(saved.dtype)
        usable = live is not None and tuple(live.shape) == saved.shape and live.dtype == dtype
        if live is None or not usable or not is_fillable(local_of(live)):
            live = torch.empty(saved.shape, dtype=dtype, device=device or (live.device if live is not None else "cpu"))
        cut = state_cut(live, parameter, name) if parameter else cut_of(live, name, self.rank)
        self.match.fill(target_of(name, live, cut))
        return live
