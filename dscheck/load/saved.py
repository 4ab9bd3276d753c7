"""What a committed step has for one rank of the job that loads it."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from dscheck.commit.contents import Contents
from dscheck.state.live import SavedState, SavedTensor


def saved_state(contents: Contents, rank: int, world: int) -> SavedState:
    """What the state room needs to know, for rank `rank` of a job of `world` ranks.

    Equal texts of several saved ranks are read once. Objects that differ between ranks are this rank's own on the same
    number of ranks; on another they are named as conflicted.
    """
    saved_world = len(contents.plan.ranks)
    # The own file first: on a node's own disk there may be no other.
    firsts = {contents.files[rank].ours.sha256: rank} if world == saved_world else {}
    for row in contents.files:
        firsts.setdefault(row.ours.sha256, row.rank)
    values: dict[str, dict[int, Any]] = defaultdict(dict)
    options: dict[str, dict[str, dict[int, Any]]] = defaultdict(lambda: defaultdict(dict))
    for first, (objects, saved_options) in contents.ours(list(firsts.values())).items():
        for path, value in objects.items():
            values[path][first] = value
        for optimizer, by_parameter in saved_options.items():
            for parameter, found in by_parameter.items():
                options[optimizer][parameter][first] = found
    own = firsts[contents.files[rank].ours.sha256] if world == saved_world else -1
    ours = {path: found.get(own, next(iter(found.values()))) for path, found in values.items()}
    conflicted = {path for path, found in values.items() if own not in found and _differ(found)}
    chosen: dict[str, dict[str, Any]] = {}
    for optimizer, by_parameter in options.items():
        chosen[optimizer] = {}
        for parameter, found in by_parameter.items():
            if own not in found and _differ(found):
                conflicted.add(f"{optimizer}.{parameter}")
            else:
                chosen[optimizer][parameter] = found.get(own, next(iter(found.values())))
    tensors = {
        name: SavedTensor(row.dtype, row.shape, None if name == row.name else row.name)
        for row in contents.plan.tensors
        for name in row.names
    }
    return SavedState(tensors, ours, frozenset(conflicted), contents.mine, chosen, saved_world)


def _text(value: Any) -> str:
    """Equal for equal values of equal types: to Python 1, 1.0 and True are one."""
    return json.dumps(value)


def _differ(found: Mapping[int, Any]) -> bool:
    return len({_text(value) for value in found.values()}) > 1
