"""nn.Module: its parameters and persistent buffers by clean name, as live memory, and its extra state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dscheck.errors import StateError
from dscheck.state.names import Names
from dscheck.state.placements import Cut, Proof, cut_of, replicated
from dscheck.state.slots import called

_EXTRA = "_extra_state"


@dataclass(frozen=True, slots=True)
class ModuleTensor:
    """One entry of a module's state: a clean name, a live sharded tensor; `owned` if only optimizers change it."""

    name: str
    tensor: torch.Tensor
    cut: Cut
    owned: bool


@dataclass(slots=True)
class ModuleState:
    """What a module's state_dict holds. `extra`: clean name → (module, what its get_extra_state returned)."""

    tensors: list[ModuleTensor] = field(default_factory=list)
    extra: dict[str, tuple[nn.Module, Any]] = field(default_factory=dict)


def read_module(name: str, module: nn.Module, rank: int) -> ModuleState:
    """The state of `module` under `name`, without collectives and without resharding it.

    Raises StateError for entries that are neither live memory nor extra state, and for FSDP1.
    """
    _refuse_fsdp1(name, module)
    with _left_as_it_is(module) as sharded:
        entries = called(name, f"{type(module).__name__}.state_dict()", partial(module.state_dict, keep_vars=True))
    names, replicas, rewritten = Names(module), _replicas(module), _rewritten_by_forward(module)
    extra = {names.clean(key): child for key, child in _with_extra_state(module)}
    state = ModuleState()
    live: set[int] | None = None
    for key, value in entries.items():
        clean = names.clean(key)
        path = f"{name}.{clean}"
        if clean in extra:
            state.extra[path] = (extra[clean], value)
            continue
        if not isinstance(value, torch.Tensor):
            raise StateError(
                f"'{path}' in the state_dict of {type(module).__name__} is a {type(value).__name__}, not a tensor: "
                "keep it in get_extra_state(), so that a load can put it back",
                path=path,
            )
        tensor = sharded.get(id(value), value)
        if not isinstance(tensor, nn.Parameter):
            live = live if live is not None else {id(buffer) for buffer in module.buffers()}
            if id(tensor) not in live:
                _refuse_computed(path, key, tensor, module)
        cut = None if isinstance(tensor, DTensor) else replicas.get(id(tensor))
        owned = isinstance(tensor, nn.Parameter) and id(tensor) not in rewritten
        state.tensors.append(ModuleTensor(path, tensor, cut or cut_of(tensor, path, rank), owned))
    return state


def _refuse_fsdp1(name: str, module: nn.Module) -> None:
    for path, child in module.named_modules():
        if any(base.__name__ == "FullyShardedDataParallel" for base in type(child).__mro__):
            raise StateError(
                f"'{name}.{path}' is wrapped in FullyShardedDataParallel (FSDP1), whose state_dict is collective: use "
                "fully_shard, or declare its flat shards with dscheck.sharded(local, global_shape, flat_range=...)",
                path=name,
            )


def _with_extra_state(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for prefix, child in module.named_modules(remove_duplicate=False):
        if type(child).get_extra_state is not nn.Module.get_extra_state:
            yield (f"{prefix}.{_EXTRA}" if prefix else _EXTRA), child


def _refuse_computed(path: str, key: str, tensor: torch.Tensor, module: nn.Module) -> None:
    """A tensor that a state_dict hook makes anew each time cannot be loaded in place."""
    with _left_as_it_is(module):
        again = module.state_dict(keep_vars=True).get(key)
    if not isinstance(again, torch.Tensor) or again.data_ptr() != tensor.data_ptr():
        raise StateError(
            f"'{path}' is computed by a state_dict hook of {type(module).__name__} and is no live parameter or buffer: "
            "put the tensors that it is computed from into the state",
            path=path,
        )


def _rewritten_by_forward(module: nn.Module) -> set[int]:
    """Parameters that a forward pass changes in place: embeddings with max_norm."""
    return {
        id(child.weight)
        for child in module.modules()
        if isinstance(child, nn.Embedding | nn.EmbeddingBag) and child.max_norm is not None
    }


def _replicas(module: nn.Module) -> dict[int, Cut]:
    """The cuts of what DistributedDataParallel keeps equal, or keeps on one rank, by identity."""
    cuts: dict[int, Cut] = {}
    for ddp in module.modules():
        if not isinstance(ddp, DistributedDataParallel):
            continue
        ranks = dist.get_process_group_ranks(ddp.process_group)
        ignored = set(ddp.parameters_to_ignore)
        for key, parameter in ddp.module.named_parameters(remove_duplicate=False):
            if key not in ignored:
                cuts[id(parameter)] = replicated(parameter.shape, ranks, Proof.MESH)
        for key, buffer in ddp.module.named_buffers(remove_duplicate=False):
            if key not in ignored:
                cuts[id(buffer)] = replicated(buffer.shape, ranks, Proof.FIRST)
    return cuts


@contextmanager
def _left_as_it_is(module: nn.Module) -> Iterator[dict[int, torch.Tensor]]:
    """Inside, state_dict() does not reshard what fully_shard has gathered; yields id(gathered) → its sharded parameter.

    After an evaluation the root stays gathered. FSDP2's state_dict hook would free that, and the next forward would pay
    an all-gather for a save; the sharded parameters, which the optimizer steps, are there all the while.
    """
    gathered = [group for group in fsdp_groups(module) if not group.is_sharded]
    sharded = {}
    for group in gathered:
        for held in group.fsdp_params:
            info = held._module_info
            sharded[id(info.module._parameters[info.param_name])] = held.sharded_param
        group._to_sharded = lambda: None  # what the hook calls, shadowed on the instance
    try:
        yield sharded
    finally:
        for group in gathered:
            del group._to_sharded


def fsdp_groups(module: nn.Module) -> Iterator[Any]:
    """The parameter groups of fully_shard in `module`, each once (a compiled wrapper shows its module's again)."""
    seen: set[int] = set()
    for child in module.modules():
        if state := getattr(child, "_get_fsdp_state", None):
            found = state()
            groups = getattr(found, "_fsdp_param_groups", None)  # torch 2.11 has one a module
            for group in [found._fsdp_param_group] if groups is None else groups:
                if group is not None and id(group) not in seen:
                    seen.add(id(group))
                    yield group


def reshard(module: nn.Module) -> None:
    """Drop what fully_shard has gathered: the next forward gathers the parameters as they are now."""
    for group in fsdp_groups(module):
        if not group.is_sharded:
            group._to_sharded()
