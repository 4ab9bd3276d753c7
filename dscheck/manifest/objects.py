"""Plain Python data as JSON values, and back: types kept, floats exact, nothing that could run code (C9).

What JSON has keeps its form; everything else is `{"$": tag, ...}`. A subclass would come back as its base, so it is
refused. Source: docs/format.md.
"""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Any

from dscheck.errors import StateError
from dscheck.manifest.arrays import Array, from_numpy, to_json, to_text
from dscheck.manifest.bundle import decode_objects, encode_objects
from dscheck.manifest.later import Later, make_now
from dscheck.manifest.tags import FACTORIES, MAX_DEPTH, decode_object

__all__ = ["Array", "Later", "decode_object", "decode_objects", "encode_object", "encode_objects"]

_MAPPINGS: dict[type, str] = {dict: "dict", OrderedDict: "OrderedDict", Counter: "Counter", defaultdict: "defaultdict"}
_SEQUENCES: dict[type, str] = {tuple: "tuple", set: "set", frozenset: "frozenset", deque: "deque"}


MakeArray = Callable[[Any, str], Array | Later | None]


def encode_object(value: Any, path: str, array: MakeArray | None = None) -> Any:
    """A JSON value that shares nothing with `value` and decodes to its equal, type by type.

    `array` is asked about every value of a type not known here, with its path; None says that it knows it neither, and
    what it makes later stands in the result as it is.
    Raises StateError with `path` ("scheduler['milestones'][3]") and the type for what cannot be stored: other types,
    subclasses, cycles, nesting beyond MAX_DEPTH.
    """
    return _Encoder(path, array).encode(value)


class _Encoder:
    def __init__(self, path: str, array: MakeArray | None) -> None:
        self._path, self._array = path, array
        self._keys: list[Any] = []
        self._open: set[int] = set()

    def encode(self, value: Any) -> Any:
        kind = type(value)
        if value is None or kind is bool or kind is str:
            return value
        if kind is int:
            return value if -(2**63) <= value < 2**63 else {"$": "int", "v": hex(value)}
        if kind is float:
            return value if math.isfinite(value) else {"$": "float", "v": repr(value)}
        if kind is complex:
            return {"$": "complex", "v": [self.encode(value.real), self.encode(value.imag)]}
        if kind is bytes:
            return {"$": "bytes", "v": to_text(value)}
        if kind is list or kind in _SEQUENCES or kind in _MAPPINGS:
            return self._container(value, kind)
        found = from_numpy(value) or (self._array(value, self._where()) if self._array else None)
        if found is None:
            raise self._refusal(value, "cannot be stored plainly")
        if isinstance(found, Later):
            return found
        return {"$": "array", **to_json(found)}

    def _container(self, value: Any, kind: type) -> Any:
        if id(value) in self._open:
            raise self._refusal(value, "contains itself")
        if len(self._keys) >= MAX_DEPTH:
            raise self._refusal(value, f"is nested in {MAX_DEPTH} others")
        self._open.add(id(value))
        if kind is list:
            encoded: Any = self._items(value)
        else:
            encoded = self._mapping(value, kind) if kind in _MAPPINGS else self._sequence(value, kind)
        self._open.discard(id(value))
        return encoded

    def _sequence(self, value: Any, kind: type) -> dict[str, Any]:
        items = self._items(value)
        if kind in (set, frozenset):
            # A set has no order: one that all ranks and runs agree on keeps equal sets equal as text.
            items.sort(key=lambda item: json.dumps(item, default=make_now))
        tagged = {"$": _SEQUENCES[kind], "v": items}
        return {**tagged, "maxlen": value.maxlen} if kind is deque else tagged

    def _mapping(self, value: Any, kind: type) -> dict[str, Any]:
        if kind is dict and "$" not in value and all(type(key) is str for key in value):
            return {key: self._child(item, key) for key, item in value.items()}
        pairs = [[self._child(key, key), self._child(item, key)] for key, item in value.items()]
        tagged = {"$": _MAPPINGS[kind], "v": pairs}
        return {**tagged, "factory": self._factory(value)} if kind is defaultdict else tagged

    def _factory(self, value: defaultdict[Any, Any]) -> str:
        for name, factory in FACTORIES.items():
            if value.default_factory is factory:
                return name
        raise self._refusal(value, "makes its defaults by more than a plain type")

    def _items(self, values: Iterable[Any]) -> list[Any]:
        return [self._child(item, index) for index, item in enumerate(values)]

    def _child(self, value: Any, key: Any) -> Any:
        self._keys.append(key)
        encoded = self.encode(value)
        self._keys.pop()
        return encoded

    def _where(self) -> str:
        return self._path + "".join(f"[{key!r}]" for key in self._keys)

    def _refusal(self, value: Any, what: str) -> StateError:
        kind, where = type(value), self._where()
        name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
        return StateError(
            f"{where} is a {name} that {what}: keep plain data there (numbers, strings, lists, tuples, dicts, sets, "
            "arrays), or give the object state_dict and load_state_dict of plain data",
            path=where,
            type=name,
        )
