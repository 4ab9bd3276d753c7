"""What a saved training state is called in the format, as the state room writes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dscheck.errors import StateError
from dscheck.manifest.later import make_now
from dscheck.manifest.objects import decode_object
from dscheck.state import per_rank
from dscheck.state.leaf import FlatState
from dscheck.state.live import LiveState
from tests.state.coded import coded

LARGE = 1 << 18


class Loader:
    """Anything with a state_dict."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def flat(**state: Any) -> FlatState:
    return LiveState(state, rank=1, world=2).flatten()


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    groups = [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[1].parameters()}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    model(torch.ones(2, 2)).sum().backward()
    optimizer.step()
    return model, optimizer


def names(found: FlatState) -> set[str]:
    return {leaf.name for leaf in found.tensors}


def test_parameters_and_buffers_are_named_by_state_and_module() -> None:
    """format F94"""
    model, _ = trained()
    expected = {f"model.{name}" for name in model.state_dict()}
    assert "model.1.running_mean" in expected
    assert names(flat(model=model)) == expected
    assert names(flat(model=torch.compile(model))) == expected


def test_optimizer_state_is_named_by_key_and_parameter() -> None:
    """format F95"""
    model, optimizer = trained()
    found = names(flat(model=model, optimizer=optimizer))
    parameters = {f"model.{name}" for name, _ in model.named_parameters()}
    for key in ("step", "exp_avg", "exp_avg_sq"):
        assert {f"optimizer.state.{key}.{name}" for name in parameters} <= found


def test_options_are_those_of_the_group_of_each_parameter() -> None:
    """format F93"""
    model, optimizer = trained()
    options = flat(model=model, optimizer=optimizer).options
    assert options.keys() == {"optimizer"}
    found = {name: decode_object(tagged) for name, tagged in options["optimizer"].items()}
    assert found.keys() == {f"model.{name}" for name, _ in model.named_parameters()}
    assert {name: group["lr"] for name, group in found.items() if name.endswith("weight")} == {
        "model.0.weight": 0.5,
        "model.1.weight": 0.1,
    }
    assert found["model.0.weight"]["betas"] == (0.9, 0.999)
    assert "params" not in found["model.0.weight"]


def test_a_tensor_of_one_rank_carries_the_rank_in_its_name() -> None:
    """format F72, F96"""
    found = flat(mine=per_rank({"table": torch.zeros(LARGE), "seen": 3}))
    assert names(found) == {"mine.table@rank1"}
    assert found.mine["mine"] == {"table": {"dscheck.tensor": "mine.table@rank1", "lib": "torch"}, "seen": 3}
    assert found.ours == {}


def test_random_streams_are_each_ranks_own() -> None:
    """format F72, F97"""
    found = flat()
    assert found.ours == {}
    assert {"python", "numpy", "torch"} <= decode_object(make_now(found.mine["dscheck.rng"])).keys()


def test_a_large_tensor_in_an_object_is_a_tensor_with_a_reference() -> None:
    """format F98"""
    loader = Loader({"table": torch.zeros(LARGE), "order": [np.zeros(LARGE, np.float32)], "small": torch.zeros(2)})
    found = flat(loader=loader)
    assert names(found) == {"loader.table", "loader.order.0"}
    assert found.ours["loader"]["table"] == {"dscheck.tensor": "loader.table", "lib": "torch"}
    assert found.ours["loader"]["order"] == [{"dscheck.tensor": "loader.order.0", "lib": "numpy"}]
    assert found.ours["loader"]["small"]["$"] == "array"
    with pytest.raises(StateError, match="keeps for itself"):
        flat(loader=Loader({"a": {"dscheck.tensor": "x"}}))


def test_a_wrapper_is_its_inner_tensors_and_an_object() -> None:
    """format F99"""
    found = flat(weight=coded(4, 8))
    assert names(found) == {"weight.codes", "weight.scale"}
    described = found.ours["weight"]["dscheck.wrapper"]
    assert list(found.ours["weight"]) == ["dscheck.wrapper"]
    assert described.keys() == {"class", "dtype", "shape", "metadata", "inner"}
    with pytest.raises(StateError, match="keeps for itself"):
        flat(loader=Loader({"a": {"dscheck.wrapper": {}}}))
