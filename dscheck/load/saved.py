"""What a committed step has for one rank of the job that loads it."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from dscheck.commit.contents import Contents
from dscheck.errors import StateError
from dscheck.state.live import SavedState, SavedTensor


def saved_state(contents: Contents, rank: int, world: int) -> SavedState:
    """What the state room needs to know, for rank `rank` of a job of `world` ranks.

    Equal texts of several saved ranks are read once. Objects that differ between ranks are this rank's own on the same
    number of ranks; on another they are named as conflicted.
    """
    firsts: dict[str, int] = {}
    for row in contents.files:
        firsts.setdefault(row.ours.sha256, row.rank)
    values: dict[str, dict[int, Any]] = defaultdict(dict)
    options: dict[str, dict[str, Any]] = defaultdict(dict)
    for first in firsts.values():
        objects, saved_options = contents.ours(first)
        for path, value in objects.items():
            values[path][first] = value
        for optimizer, by_parameter in saved_options.items():
            _join(options[optimizer], by_parameter, optimizer)
    saved_world = len(contents.plan.ranks)
    own = firsts[contents.files[rank].ours.sha256] if world == saved_world else -1
    ours = {path: found.get(own, next(iter(found.values()))) for path, found in values.items()}
    conflicted = frozenset(path for path, found in values.items() if own not in found and _differ(found))
    tensors = {
        name: SavedTensor(row.dtype, row.shape, None if name == row.name else row.name)
        for row in contents.plan.tensors
        for name in row.names
    }
    return SavedState(tensors, ours, conflicted, contents.mine, options, saved_world)


def _text(value: Any) -> str:
    """Equal for equal values of equal types: to Python 1, 1.0 and True are one."""
    return json.dumps(value)


def _differ(found: Mapping[int, Any]) -> bool:
    return len({_text(value) for value in found.values()}) > 1


def _join(into: dict[str, Any], more: Mapping[str, Any], optimizer: str) -> None:
    """Options by parameter of several ranks: pipeline stages have other parameters, replicas the same."""
    for parameter, options in more.items():
        known = into.setdefault(parameter, options)
        if known is not options and _text(known) != _text(options):
            raise StateError(
                f"optimizer '{optimizer}': the saved ranks had different options for parameter '{parameter}'",
                path=f"{optimizer}.{parameter}",
            )
