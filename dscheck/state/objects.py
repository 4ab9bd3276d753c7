"""Plain objects with tensors inside: small ones stay in the object, large ones become tensors of the checkpoint."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from dscheck.errors import CorruptCheckpointError, StateError
from dscheck.manifest.dtypes import ITEMSIZE
from dscheck.manifest.objects import Array, Later, decode_object, encode_object
from dscheck.state.tensors import alias, dtype_name, is_wrapper, local_of, refuse_unstorable, torch_dtype
from dscheck.state.wrappers import KEY as WRAPPER

LIFTED_BYTES = 1 << 20
"""A tensor in an object is a tensor of the checkpoint from this size on, and part of the object below it."""

_REFERENCE = "dscheck.tensor"
_RESERVED = (_REFERENCE, WRAPPER)
_DEEPEST = 100
_MAPPINGS = (dict, OrderedDict, defaultdict)

Lift = Callable[[str, torch.Tensor], str]
Find = Callable[[str], torch.Tensor]


def encode(value: Any, name: str, lift: Lift) -> Any:
    """The tagged form of an object called `name`; large tensors go to `lift` with their dotted paths.

    In the object stands {"dscheck.tensor": the name that `lift` gave, "lib": "torch" or "numpy"}. Raises StateError by
    path.
    """

    def visit(at: str, item: Any) -> Any:
        if type(item) is dict and (key := next((key for key in _RESERVED if key in item), None)):
            raise StateError(f"'{at}' has the key '{key}', which dscheck keeps for itself: rename it", path=at)
        if isinstance(item, torch.Tensor) and is_wrapper(local_of(item)):
            refuse_unstorable(local_of(item), at)
        if (tensor := _liftable(item)) is None:
            return item
        return {_REFERENCE: lift(at, tensor), "lib": "torch" if isinstance(item, torch.Tensor) else "numpy"}

    return encode_object(_walk(value, name, visit), name, to_array)


def decode(stored: Any, name: str, find: Find) -> Any:
    """The object again. `find` gives the memory of a tensor that it refers to: filled by the time the load is finished.

    Raises CorruptCheckpointError when `stored` is no encoded object.
    """

    def visit(at: str, item: Any) -> Any:
        if type(item) is not dict or _REFERENCE not in item:
            return item
        reference = item[_REFERENCE]
        if type(reference) is not str or item.get("lib") not in ("torch", "numpy"):
            raise CorruptCheckpointError(
                f"the stored object '{name}' is damaged: '{at}' refers to {reference!r}", path=name
            )
        tensor = find(reference)
        return tensor if item["lib"] == "torch" else tensor.numpy()

    return _walk(decode_object(stored, name, from_array), name, visit)


def tensors_in(value: Any, name: str) -> dict[str, torch.Tensor]:
    """All tensors and large arrays of a live object by the names that `encode` would give them."""
    found: dict[str, torch.Tensor] = {}

    def visit(at: str, item: Any) -> Any:
        tensor = item if isinstance(item, torch.Tensor) else _liftable(item)
        if tensor is not None:
            found[at] = tensor
        return item

    _walk(value, name, visit)
    return found


def like_live(value: Any, name: str, live: Mapping[str, torch.Tensor]) -> Any:
    """`value` with its tensors on the devices that the live object has them on."""

    def visit(at: str, item: Any) -> Any:
        return item.to(live[at].device) if isinstance(item, torch.Tensor) and at in live else item

    return _walk(value, name, visit)


def on_device(value: Any, name: str, device: torch.device) -> Any:
    """`value` with all its tensors on one device."""
    return _walk(value, name, lambda _, item: item.to(device) if isinstance(item, torch.Tensor) else item)


def _walk(value: Any, at: str, visit: Callable[[str, Any], Any], depth: int = 0) -> Any:
    """`value` with every item replaced by what `visit` makes of it; containers are copied only where one changed."""
    seen = visit(at, value)
    kind = type(value)
    if seen is not value or depth > _DEEPEST:
        return seen
    if kind in _MAPPINGS:
        items = {key: _walk(item, f"{at}.{key}", visit, depth + 1) for key, item in value.items()}
        if all(items[key] is item for key, item in value.items()):
            return value
        copied = value.copy()
        copied.update(items)
        return copied
    if kind is list or kind is tuple:
        walked = [_walk(item, f"{at}.{index}", visit, depth + 1) for index, item in enumerate(value)]
        return value if all(map(_same, walked, value)) else kind(walked)
    return value


def _same(one: Any, other: Any) -> bool:
    return one is other


def _liftable(item: Any) -> torch.Tensor | None:
    if isinstance(item, DTensor):
        return item
    if isinstance(item, torch.Tensor):
        return item if item.numel() * item.element_size() >= LIFTED_BYTES else None
    if type(item) is np.ndarray and item.nbytes >= LIFTED_BYTES and item.dtype.name in ITEMSIZE:
        native = np.ascontiguousarray(item, item.dtype.newbyteorder("="))
        return torch.from_numpy(native if native.flags.writeable else native.copy())
    return None


def to_array(value: Any, path: str) -> Array | Later | None:
    """A torch tensor in neutral form; None for what is no tensor. Raises StateError for what cannot be stored.

    One on a device is copied there, in the order of its stream, and read later: no call waits for the device here.
    """
    if not isinstance(value, torch.Tensor):
        return None
    refuse_unstorable(value, path)
    dtype, local = dtype_name(value.dtype, path), alias(value)
    if local.device.type != "cpu":
        return _read_later(local, path)
    local = local.contiguous()
    data = local.reshape(-1).view(torch.uint8).numpy().tobytes() if local.numel() else b""
    return Array("torch", dtype, tuple(local.shape), data)


def _read_later(local: torch.Tensor, path: str) -> Later:
    copied, copying = local.clone(), torch.accelerator.current_stream(local.device).record_event()

    def read() -> Any:
        copying.synchronize()
        return encode_object(copied.cpu(), path, to_array)

    return Later(read)


def from_array(array: Array) -> torch.Tensor:
    """The tensor that `to_array` was given, on the CPU, in memory of its own."""
    dtype = torch_dtype(array.dtype)
    if not prod(array.shape):
        return torch.empty(array.shape, dtype=dtype)
    return torch.frombuffer(bytearray(array.data), dtype=torch.uint8).view(dtype).view(array.shape)
