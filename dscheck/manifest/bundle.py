"""The sealed texts at the end of a data file: "ours", equal on all ranks where it can be, and "mine", in one form.

Options are those of an optimizer's parameter group, found by the parameter's name; parameters of one group share one
entry, or a thousand parameters would write the same options a thousand times. Source: docs/format.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dscheck.manifest.fields import VERSION, Fields
from dscheck.manifest.later import make_now
from dscheck.manifest.text import seal, unseal

Options = Mapping[str, Mapping[str, Any]]
"""Optimizer → parameter → the options of its group, in tagged form."""


def encode_objects(objects: Mapping[str, Any], options: Options | None = None) -> bytes:
    """The text of objects by path and of options, both in the tagged form of objects.py.

    Equal ones give equal text, unless dicts in them differ in order. What is made later is made now.
    """
    grouped = {name: _grouped(parameters) for name, parameters in sorted((options or {}).items())}
    members = {"objects": dict(sorted(objects.items())), "options": grouped}
    return seal({"version": VERSION, "requires": [], "kind": "objects", **members})


def decode_objects(data: bytes, key: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The objects and options, still tagged; parameters of one group share one value.

    Raises CorruptCheckpointError, which names the data file `key`, for what `encode_objects` does not make.
    """
    fields = Fields(unseal(data, key, limit_bytes=None), key)
    fields.envelope("objects")
    options = fields.fields("options")
    return fields.members("objects"), {name: _expanded(options.fields(name)) for name in fields.members("options")}


def _grouped(parameters: Mapping[str, Any]) -> dict[str, Any]:
    texts = {id(options): options for options in parameters.values()}  # one object a group, mostly
    encoded = {key: json.dumps(options, default=make_now) for key, options in texts.items()}
    groups: list[Any] = []
    numbers: dict[str, int] = {}
    members = {}
    for name, options in sorted(parameters.items()):
        text = encoded[id(options)]
        members[name] = numbers.setdefault(text, len(groups))
        if members[name] == len(groups):
            groups.append(json.loads(text))
    return {"groups": groups, "parameters": members}


def _expanded(optimizer: Fields) -> dict[str, Any]:
    groups, parameters = optimizer.items("groups"), optimizer.fields("parameters")
    found = {}
    for name in optimizer.members("parameters"):
        number = parameters.count(name)
        if number >= len(groups):
            raise parameters.corrupt(name, f"is group {number} of {len(groups)}")
        found[name] = groups[number]
    return found
