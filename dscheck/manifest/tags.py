"""What each tag of a stored object means, and how JSON values become objects again. Source: docs/format.md."""

from __future__ import annotations

import re
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

from dscheck.errors import CorruptCheckpointError
from dscheck.manifest.arrays import Array, from_json, from_text, to_numpy

MAX_DEPTH = 64
"""Containers in containers. Each takes up to three levels of JSON and five Python calls, of 1,000."""

FACTORIES: dict[str, Callable[[], Any] | None] = {
    "none": None,
    **{kind.__name__: kind for kind in (bool, int, float, str, list, dict, set, tuple)},
}
"""What a defaultdict may make its defaults with."""

_HEX = re.compile(r"-?0x[0-9a-f]+", re.ASCII)
# Python's ints hash modulo 2**61 - 1: keys that all hash alike would make building a dict quadratic.
_MAX_COLLISIONS = 64


def decode_object(value: Any, path: str = "object", array: Callable[[Array], Any] | None = None) -> Any:
    """The object that `encode_object` was given. `array` makes torch's tensors again; without it they stay Arrays.

    Raises CorruptCheckpointError, which names `path`, for every JSON value that is not in the format.
    """
    try:
        return _Decoder(array).decode(value)
    except (ValueError, TypeError) as error:
        message = f"the stored object '{path}' is damaged, or was not written by this version of dscheck: {error}"
        raise CorruptCheckpointError(message, path=path) from error


class _Decoder:
    def __init__(self, array: Callable[[Array], Any] | None) -> None:
        self.array = array
        self._depth = 0

    def decode(self, value: Any) -> Any:
        kind = type(value)
        if kind is not dict and kind is not list:
            return value
        # Two more than containers: a tagged number in a tagged complex.
        if self._depth >= MAX_DEPTH + 2:
            raise ValueError(f"it is nested deeper than {MAX_DEPTH}")
        self._depth += 1
        if kind is list:
            decoded: Any = self.items(value)
        elif "$" in value:
            decoded = self._tagged(value)
        else:
            decoded = {key: self.decode(item) for key, item in value.items()}
        self._depth -= 1
        return decoded

    def items(self, values: Any) -> list[Any]:
        return [self.decode(item) for item in _list(values)]

    def pairs(self, pairs: Any) -> dict[Any, Any]:
        if any(len(_list(pair)) != 2 for pair in _list(pairs)):
            raise ValueError("an entry of a dict is no pair")
        keys, values = [self.decode(key) for key, _ in pairs], [self.decode(value) for _, value in pairs]
        _check_keys(keys)
        return dict(zip(keys, values, strict=True))

    def _tagged(self, value: dict[str, Any]) -> Any:
        tag = value["$"]
        form = _FORMS.get(tag) if type(tag) is str else None
        if form is None:
            raise ValueError(f"the tag {tag!r} is unknown")
        build, members = form[0], form[1:]
        if value.keys() != {"$", *members}:
            raise ValueError(f"a {tag} has the members {sorted(value)}")
        return build(self, *(value[member] for member in members))


def _list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise ValueError(f"a list was expected, {type(value).__name__} found")
    return value


def _check_keys(keys: list[Any]) -> None:
    """Raises TypeError for unhashable keys, ValueError for keys that are equal or chosen to collide."""
    if max(Counter(map(hash, keys)).values(), default=0) > _MAX_COLLISIONS:
        raise ValueError(f"more than {_MAX_COLLISIONS} keys have one hash")
    if len(set(keys)) != len(keys):
        raise ValueError("a key or an element occurs twice")


def _tuple(decoder: _Decoder, values: Any) -> tuple[Any, ...]:
    return tuple(decoder.items(values))


def _set(decoder: _Decoder, values: Any) -> set[Any]:
    items = decoder.items(values)
    _check_keys(items)
    return set(items)


def _frozenset(decoder: _Decoder, values: Any) -> frozenset[Any]:
    return frozenset(_set(decoder, values))


def _deque(decoder: _Decoder, values: Any, maxlen: Any) -> deque[Any]:
    items = decoder.items(values)
    if maxlen is not None and (type(maxlen) is not int or not len(items) <= maxlen <= sys.maxsize):
        raise ValueError(f"a deque of {len(items)} has maxlen {maxlen!r}")
    return deque(items, maxlen)


def _dict(decoder: _Decoder, pairs: Any) -> dict[Any, Any]:
    return decoder.pairs(pairs)


def _ordered(decoder: _Decoder, pairs: Any) -> OrderedDict[Any, Any]:
    return OrderedDict(decoder.pairs(pairs))


def _counter(decoder: _Decoder, pairs: Any) -> Counter[Any]:
    return Counter(decoder.pairs(pairs))


def _default(decoder: _Decoder, pairs: Any, factory: Any) -> defaultdict[Any, Any]:
    if type(factory) is not str or factory not in FACTORIES:
        raise ValueError(f"a defaultdict has the unknown factory {factory!r}")
    return defaultdict(FACTORIES[factory], decoder.pairs(pairs))


def _bytes(decoder: _Decoder, text: Any) -> bytes:
    return from_text(text)


def _int(decoder: _Decoder, text: Any) -> int:
    if type(text) is not str or not _HEX.fullmatch(text):
        raise ValueError("an int is no hex number")
    return int(text, 16)


def _float(decoder: _Decoder, text: Any) -> float:
    if text not in ("nan", "inf", "-inf"):
        raise ValueError(f"a float is {text!r}")
    return float(text)


def _complex(decoder: _Decoder, parts: Any) -> complex:
    numbers = decoder.items(parts)
    if len(numbers) != 2 or any(type(number) is not float for number in numbers):
        raise ValueError("a complex is not two floats")
    return complex(*numbers)


def _array(decoder: _Decoder, lib: Any, dtype: Any, shape: Any, data: Any) -> Any:
    found = from_json(lib, dtype, shape, data)
    if found.lib != "torch":
        return to_numpy(found)
    return decoder.array(found) if decoder.array else found


_FORMS: dict[str, tuple[Any, ...]] = {
    "tuple": (_tuple, "v"),
    "set": (_set, "v"),
    "frozenset": (_frozenset, "v"),
    "deque": (_deque, "v", "maxlen"),
    "dict": (_dict, "v"),
    "OrderedDict": (_ordered, "v"),
    "Counter": (_counter, "v"),
    "defaultdict": (_default, "v", "factory"),
    "bytes": (_bytes, "v"),
    "int": (_int, "v"),
    "float": (_float, "v"),
    "complex": (_complex, "v"),
    "array": (_array, "lib", "dtype", "shape", "data"),
}
