"""The two sealed texts at the end of a data file: "ours", equal on all ranks where it can be, and "mine".

Options are those of an optimizer's parameter group, found by the parameter's name; parameters of one group share one
entry, or a thousand parameters would write the same options a thousand times. Source: docs/format.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dscheck.manifest.fields import VERSION, Fields
from dscheck.manifest.text import seal, unseal

Options = Mapping[str, Mapping[str, Any]]
"""Optimizer → parameter → the options of its group, in tagged form."""


@dataclass(frozen=True, slots=True)
class Ours:
    """Plain objects by path, and options, all in the tagged form of objects.py."""

    objects: Mapping[str, Any] = field(default_factory=dict)
    options: Options = field(default_factory=dict)


def encode_ours(ours: Ours) -> bytes:
    """Equal objects and options give equal text, unless dicts in them differ in order."""
    options = {name: _grouped(parameters) for name, parameters in sorted(ours.options.items())}
    return seal({**_envelope("ours", ours.objects), "options": options})


def encode_mine(objects: Mapping[str, Any]) -> bytes:
    """What belongs to one rank alone: objects by path, in tagged form."""
    return seal(_envelope("mine", objects))


def decode_ours(data: bytes, key: str) -> Ours:
    """Parameters of one group share one value. CorruptCheckpointError, with the data file's `key`, for other texts."""
    fields = Fields(unseal(data, key, limit_bytes=None), key)
    fields.envelope("ours")
    options = fields.fields("options")
    return Ours(
        fields.members("objects"), {name: _expanded(options.fields(name)) for name in fields.members("options")}
    )


def decode_mine(data: bytes, key: str) -> dict[str, Any]:
    """Raises CorruptCheckpointError, naming the data file `key`, for what `encode_mine` does not make."""
    fields = Fields(unseal(data, key, limit_bytes=None), key)
    fields.envelope("mine")
    return fields.members("objects")


def _envelope(kind: str, objects: Mapping[str, Any]) -> dict[str, Any]:
    return {"version": VERSION, "requires": [], "kind": kind, "objects": dict(sorted(objects.items()))}


def _grouped(parameters: Mapping[str, Any]) -> dict[str, Any]:
    groups: list[Any] = []
    numbers: dict[str, int] = {}
    members = {}
    for name, options in sorted(parameters.items()):
        members[name] = numbers.setdefault(json.dumps(options), len(groups))
        if members[name] == len(groups):
            groups.append(options)
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
