"""Tensors that wrap others (8-bit optimizer states, float8 weights): their inner tensors, and what else they are."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from math import prod
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from dscheck.errors import ConfigError, StateError, StateMismatchError
from dscheck.manifest.objects import encode_object
from dscheck.state.placements import Cut, cut_of, stacked
from dscheck.state.saved import Match
from dscheck.state.tensors import is_wrapper, local_of

KEY = "dscheck.wrapper"
"""The one key of the stored object that describes a wrapper."""

_BY_NAME = (torch.dtype, torch.layout, torch.memory_format)


@dataclass(frozen=True, slots=True)
class Wrapped:
    """A wrapper taken apart: its inner tensors with their cuts by dotted attribute, and the stored form of the rest."""

    inner: dict[str, tuple[torch.Tensor, Cut]]
    described: Any


def take_apart(tensor: torch.Tensor, cut: Cut, path: str) -> Wrapped:
    """The plain tensors inside a wrapper, or inside a DTensor of wrappers, that is cut as `cut`.

    `described` has the class, the shape, all dtypes and the flatten metadata; at load it is compared, nothing more.
    Raises StateError, by path, for metadata that is no plain data and for inner tensors of unknown placement.
    """
    local = local_of(tensor)
    inner = {name: (item, _cut(tensor, cut, item, f"{path}.{name}")) for name, item in _inner(local, path)}
    return Wrapped(inner, encode_object({KEY: {"shape": list(cut.shape), **_described(local, path)}}, path))


def _inner(local: torch.Tensor, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    for name, item in _attributes(local, path):
        if is_wrapper(item):
            yield from ((f"{name}.{below}", plain) for below, plain in _inner(item, f"{path}.{name}"))
        else:
            yield name, item


def _attributes(local: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    for name in local.__tensor_flatten__()[0]:
        item = getattr(local, name)
        if not isinstance(item, torch.Tensor):
            raise StateError(f"'{path}.{name}' of a {type(local).__name__} is no tensor", path=path)
        yield name, item


def _cut(outer: torch.Tensor, cut: Cut, inner: torch.Tensor, path: str) -> Cut:
    """An inner tensor is whole where its wrapper is, is cut alike where it has the same shape, or belongs to its shard.

    What a shard alone knows (the scales of its blocks) has no place in a global tensor: the shards' are stacked along a
    new first dimension, so that as many shards get them back, and no others.
    """
    if isinstance(inner, DTensor):
        return cut_of(inner, path, 0)
    if cut.is_whole:
        return cut.whole_of(inner.shape)
    if tuple(inner.shape) == cut.local_shape:
        return cut
    if isinstance(outer, DTensor) and inner.is_contiguous():
        stack = stacked(outer, cut, inner.shape)
        if prod(cut.local_shape) * stack.shape[0] == prod(cut.shape):
            return stack
    raise StateError(
        f"'{path}' of shape {list(inner.shape)} is part of a {type(local_of(outer)).__name__} that holds "
        f"{list(cut.local_shape)} of {list(cut.shape)} here: such shards are stored only where a DTensor cuts them "
        "evenly: pad the tensor to a multiple of its shards, replicate it, or leave it unquantized",
        path=path,
    )


def _described(local: Any, path: str) -> dict[str, Any]:
    return {
        "class": _class_name(type(local)),
        "dtype": str(local.dtype),
        "metadata": _plain(local.__tensor_flatten__()[1], path),
        "inner": {
            name: _described(item, path) if is_wrapper(item) else str(local_of(item).dtype)
            for name, item in _attributes(local, path)
        },
    }


def _plain(value: Any, path: str) -> Any:
    """Metadata as plain data, to be compared. A device is left out: where a tensor lies is not what it is."""
    if value is None or isinstance(value, torch.device):
        return None
    if isinstance(value, enum.Enum):
        return f"{_class_name(type(value))}.{value.name}"
    if type(value) in (bool, int, float, str):
        return value
    if isinstance(value, _BY_NAME):
        return str(value)
    if isinstance(value, type):
        return _class_name(value)
    if is_dataclass(value):
        members = {field.name: _plain(getattr(value, field.name), path) for field in fields(value)}
        return {"class": _class_name(type(value)), **members}
    if isinstance(value, Mapping) and all(type(key) is str for key in value):
        return {key: _plain(item, path) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, path) for item in value]
    raise StateError(
        f"tensor '{path}': its flatten metadata has a {type(value).__name__}, which is no plain data: dequantize it, "
        "or store its inner tensors by themselves",
        path=path,
    )


def _class_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _saved(stored: Any) -> dict[str, Any] | None:
    """What a stored object says of a wrapper; None when it describes none."""
    found = stored.get(KEY) if type(stored) is dict else None
    return found if type(found) is dict else None


def match_described(names: Sequence[str], described: Any, match: Match) -> None:
    """Note under which of its names a wrapper is found; its inner tensors are matched by themselves.

    Raises StateMismatchError when something else was saved, ConfigError when `only` covers a part of it.
    """
    wanted = [name for name in names if match.wants(name)]
    if not wanted:
        if part := next((name for name in names if match.touches(name)), None):
            raise ConfigError(f"only={list(match.only or ())}: '{part}' is one tensor, a wrapper: name it as a whole")
        return
    found = [name for name in wanted if name in match.saved.ours]
    for name in found:
        if (stored := match.object(name)) != described:
            raise StateMismatchError(_difference(name, stored, described), names=[name])
    if found:
        return
    if plain := next((name for name in wanted if name in match.saved.tensors), None):
        kind = described[KEY]["class"]
        raise StateMismatchError(
            f"'{plain}' is a {kind} here and was saved as a plain {match.saved.tensors[plain].dtype} tensor: load "
            "before it is wrapped or quantized",
            names=[plain],
        )
    match.missing.append(names[0])


def _difference(name: str, stored: Any, described: Any) -> str:
    live, saved = described[KEY], _saved(stored)
    if saved is None:
        return f"'{name}' is a {live['class']} here and was saved as an object"
    shown = "; ".join(f"{key} {saved.get(key)} saved, {live[key]} live" for key in live if saved.get(key) != live[key])
    return f"tensor '{name}', a {live['class']}, differs from the saved one: {shown or 'saved with other fields'}"


def refuse_saved_wrapper(name: str, match: Match, live: str, instead: str) -> None:
    """Raise StateMismatchError if `name` was saved as a wrapper, of which there is none here: `live` is there."""
    saved = _saved(match.saved.ours.get(name))
    if saved is not None:
        raise StateMismatchError(
            f"'{name}' was saved as a {saved.get('class')} and is {live} here; no checkpoint chooses a class to "
            f"make: {instead}",
            names=[name],
        )
