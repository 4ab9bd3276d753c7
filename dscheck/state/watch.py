"""What to look at to know that the live state still has the structure that a survey found, without another survey."""

from __future__ import annotations

import copy
import enum
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dscheck.native import Anything, At, Entries, Equal, Kind, Members, Node, Same, Standing
from dscheck.state.boxes import PerRank, Sharded
from dscheck.state.optimizers import NamedOptimizer, Parameter, is_optimizer
from dscheck.state.survey import Survey, holds_more_than_data
from dscheck.state.tensors import is_wrapper

_HELD = (torch.Tensor, Sharded, nn.Module)
_ANYTHING, _NONE = Anything(), Kind(type(None))
_COMPARED = (bool, int, float, str, torch.dtype, torch.device, torch.layout)


def watched(owner: Any, mapping: Mapping[str, Any], found: Survey) -> list[Standing] | None:
    """All that decides which tensors and objects the state has, under which names; `owner.mapping` is the mapping.

    None where a look at them could miss a change: modules with a state_dict of their own, or hooks on it that are not
    torch's. Values of plain data are wanted, under the names of their objects.
    """
    seen: dict[int, nn.Module] = {}
    for module in found.modules.values():
        seen.update((id(child), child) for child in module.modules())
    if not all(map(_is_plainly_stored, seen.values())) or not _are_all_found(found):
        return None
    try:
        roots = [Standing(owner, {"mapping": _of_mapping(mapping)})]
        roots += [Standing(box, {"value": Kind(type(box.value), name)}) for name, box in found.per_rank.items()]
        roots += [_module(module) for module in seen.values()]
        for optimizer in found.optimizers:
            roots += _optimizer(optimizer)
        for tensor in {id(tensor): tensor for tensor in found.tensors()}.values():
            roots += _inside(tensor)
    except TypeError:  # something of it cannot be referred to weakly
        return None
    return roots


def _is_plainly_stored(module: nn.Module) -> bool:
    kind, own = type(module), module.__dict__
    hooks = [*module._state_dict_hooks.values(), *module._state_dict_pre_hooks.values()]
    return (
        kind.state_dict is nn.Module.state_dict
        and kind._save_to_state_dict is nn.Module._save_to_state_dict
        and "state_dict" not in own
        and "_save_to_state_dict" not in own
        and all((getattr(hook, "__module__", None) or "").startswith("torch.") for hook in hooks)
    )


def _are_all_found(found: Survey) -> bool:
    """Whether the modules' own tensors are the ones that the survey took; those of a gathered FSDP2 module are not."""
    known = {id(tensor) for tensor in found.tensors()}
    own = [
        tensor
        for module in found.modules.values()
        for child in module.modules()
        for tensor in (*child._parameters.values(), *_persistent(child))
        if tensor is not None
    ]
    return all(id(tensor) in known for tensor in own)


def _persistent(module: nn.Module) -> Iterator[torch.Tensor | None]:
    transient = module._non_persistent_buffers_set
    return (buffer for name, buffer in module._buffers.items() if name not in transient)


def _of_mapping(value: Any, name: str = "") -> Node:
    items = list(value.items() if isinstance(value, Mapping) else enumerate(value))
    return Entries(value, [_value(f"{name}{key}", item) for key, item in items])


def _value(name: str, value: Any) -> Node:
    if isinstance(value, (*_HELD, PerRank)) or is_optimizer(value):
        return Same(value)
    if holds_more_than_data(value):
        return _of_mapping(value, f"{name}.")
    return Kind(type(value), name)


def _at(value: Any) -> Node:
    """A tensor or module, of those that are shown to be alive: the first by their memory, the others as roots."""
    return _NONE if value is None else At(value)


def _module(module: nn.Module) -> Standing:
    transient = module._non_persistent_buffers_set
    attributes: dict[str, Node] = {
        "_parameters": Entries(module._parameters, [_at(value) for value in module._parameters.values()]),
        "_buffers": Entries(
            module._buffers,
            # What is not saved may be made anew in each forward pass.
            [_ANYTHING if name in transient else _at(value) for name, value in module._buffers.items()],
        ),
        "_modules": Entries(module._modules, [_at(value) for value in module._modules.values()]),
        "_non_persistent_buffers_set": Equal(frozenset(transient)),
        "_state_dict_hooks": Entries(module._state_dict_hooks, [_ANYTHING] * len(module._state_dict_hooks)),
        "_state_dict_pre_hooks": Entries(module._state_dict_pre_hooks, [_ANYTHING] * len(module._state_dict_pre_hooks)),
    }
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        attributes["max_norm"] = Kind(type(module.max_norm))
    if isinstance(module, DistributedDataParallel):
        attributes["process_group"] = Same(module.process_group)
        attributes["parameters_to_ignore"] = Equal(copy.copy(module.parameters_to_ignore))
    return Standing(module, attributes, ("state_dict", "_save_to_state_dict"))


def _optimizer(optimizer: NamedOptimizer) -> Iterator[Standing]:
    """Its wrappers, whose inner optimizer may be exchanged, then itself. The options of its groups are no structure."""
    for wrapper in optimizer.wrappers:
        yield Standing(wrapper, {"__dict__": _members(wrapper)})
    inner = optimizer.inner
    names = {id(parameter.tensor): parameter for parameter in optimizer.parameters}
    states = [
        _state(optimizer, names.get(id(owner)), state)
        if isinstance(owner, torch.Tensor)
        else Kind(type(state), optimizer.state_name(owner, None))
        for owner, state in inner.state.items()
    ]
    yield Standing(
        inner,
        {
            "__dict__": _members(inner),
            "param_groups": Entries(inner.param_groups, [_group(group) for group in inner.param_groups]),
            "state": Entries(inner.state, states),
        },
    )


def _members(holder: Any) -> Node:
    members = holder.__dict__
    return Entries(
        members, [Same(item) if isinstance(item, Optimizer) else Kind(type(item)) for item in members.values()]
    )


def _group(group: dict[str, Any]) -> Node:
    members: dict[str, Node] = {"params": Entries(group["params"], list(map(At, group["params"])))}
    if "param_names" in group:
        members["param_names"] = Equal(copy.copy(group["param_names"]))
    return Members(members)


def _state(optimizer: NamedOptimizer, parameter: Parameter | None, state: Mapping[str, Any]) -> Node:
    return Entries(
        state,
        [
            At(value) if isinstance(value, torch.Tensor) else Kind(type(value), optimizer.state_name(key, parameter))
            for key, value in state.items()
        ],
    )


def _inside(tensor: Any) -> Iterator[Standing]:
    """What a DTensor or a wrapper refers to for its values; nothing for a tensor with bytes of its own."""
    if isinstance(tensor, DTensor):
        yield Standing(tensor, {"_local_tensor": Same(tensor._local_tensor), "_spec": Same(tensor._spec)})
        yield from _inside(tensor._local_tensor)
    elif is_wrapper(tensor):
        members = tensor.__dict__
        for name in tensor.__tensor_flatten__()[0]:
            if getattr(tensor, name) is not members.get(name):
                raise TypeError(f"'{name}' of a {type(tensor).__name__} is kept elsewhere than in its __dict__")
            yield from _inside(members[name])
        yield Standing(tensor, {"__dict__": Entries(members, list(map(_metadata, members.values())))})


def _metadata(value: Any) -> Node:
    """An attribute of a wrapper. Raises TypeError for one that could change in place without being seen."""
    if value is None:
        return _NONE
    if _is_compared(value):
        return Equal(copy.deepcopy(value))
    if isinstance(value, torch.Tensor | type | enum.Enum):
        return Same(value)
    raise TypeError(f"a {type(value).__name__} cannot be watched")


def _is_compared(value: Any) -> bool:
    if type(value) is dict:
        return all(map(_is_compared, (*value, *value.values())))
    if type(value) in (list, tuple, torch.Size):
        return all(map(_is_compared, value))
    return value is None or isinstance(value, _COMPARED)
