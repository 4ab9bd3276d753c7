"""The bytes of an answer: what rank 0 decided, or an error that every rank raises. JSON, never pickle."""

from __future__ import annotations

import json
from typing import Any

from dscheck import errors
from dscheck.errors import DscheckError
from dscheck.layout.region import Region

_ANSWER, _ERROR = b"A", b"E"


def seal_answer(payload: bytes) -> bytes:
    """An answer that `open_answer` returns as it is."""
    return _ANSWER + payload


def seal_error(error: DscheckError) -> bytes:
    """An answer that `open_answer` raises, with the type, message and plain fields of `error`."""
    body = {"class": type(error).__name__, "message": str(error), "fields": _plain(error.fields)}
    return _ERROR + json.dumps(body).encode()


def open_answer(data: bytes) -> bytes:
    """The payload of a sealed answer; a sealed error is raised, as DscheckError when its class is not known here."""
    if data[:1] == _ANSWER:
        return data[1:]
    body = json.loads(data[1:])
    known = getattr(errors, body["class"], DscheckError)
    if not (isinstance(known, type) and issubclass(known, DscheckError)):
        known = DscheckError
    raise known(body["message"], **_unplain(body["fields"]))


def _plain(value: Any) -> Any:
    """`value` as JSON; tuples and regions keep their type, and what JSON cannot say becomes its repr."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Region):
        return {"$": "region", "v": [list(value.start), list(value.stop)]}
    if isinstance(value, tuple):
        return {"$": "tuple", "v": [_plain(item) for item in value]}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) and key != "$" for key in value):
        return {key: _plain(item) for key, item in value.items()}
    return repr(value)


def _unplain(value: Any) -> Any:
    if isinstance(value, list):
        return [_unplain(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.get("$") == "tuple":
        return tuple(_unplain(item) for item in value["v"])
    if value.get("$") == "region":
        return Region(tuple(value["v"][0]), tuple(value["v"][1]))
    return {key: _unplain(item) for key, item in value.items()}
