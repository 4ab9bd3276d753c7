"""How often a flatten walked over the whole state, and whether one that did not gave the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dscheck.manifest.later import make_now
from dscheck.state import FlatState, LiveState
from dscheck.state.survey import Survey

State = dict[str, Any]


class Counted(LiveState):
    """Counts the walks over the whole state."""

    walks = 0

    def survey(self) -> Survey:
        self.walks += 1
        return super().survey()


def stepped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def assert_same(found: FlatState, expected: FlatState) -> None:
    assert found.tensors == expected.tensors
    assert [(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in found.locals] == [
        (t.data_ptr(), t.shape, t.stride(), t.dtype) for t in expected.locals
    ]
    assert found.mesh == expected.mesh
    assert _as_text(found) == _as_text(expected)


def _as_text(flat: FlatState) -> str:
    return json.dumps([flat.ours, flat.mine, flat.options], default=make_now)


def walks_after(change: Callable[[State], Any], state: State) -> int:
    """How many walks a flatten needed after `change`; what it gives is compared with that of a new LiveState."""
    live = Counted(state, rank=0, world=1)
    first = live.flatten()
    again = live.flatten()
    assert (live.walks, again.tensors is first.tensors) == (1, True)
    # That something is gone must not be all that tells.
    kept = [first, *state.values(), *_modules(state), *(getattr(item, "optimizer", None) for item in state.values())]
    kept.append(change(state))
    assert_same(live.flatten(), LiveState(state, rank=0, world=1).flatten())
    walks = live.walks - 1
    assert_same(live.flatten(), LiveState(state, rank=0, world=1).flatten())
    assert live.walks - 1 == walks, "a second flatten after the change looked at the structure of before"
    del kept
    return walks


def _modules(state: State) -> list[nn.Module]:
    return [child for value in state.values() if isinstance(value, nn.Module) for child in value.modules()]
