"""What is wanted of a checkpoint, what is missing, and that preparing touches nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from dscheck.errors import ConfigError, StateMismatchError
from dscheck.state import LiveState
from tests.state.roundtrip import load, save


def make(seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 + seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return {"model": model, "optimizer": optimizer, "step": seed, "history": [seed]}


def shown(state: dict[str, Any]) -> str:
    torch.set_printoptions(precision=9)
    optimizer = state["optimizer"].state_dict()
    return repr((state["model"].state_dict(), optimizer, state["step"], state["history"], torch.get_rng_state()))


def test_prepare_touches_nothing() -> None:
    checkpoint, state = save(make()), make(1)
    before = shown(state)
    LiveState(state, rank=0, world=1).prepare(checkpoint.seen_by(0, 1), None, True)
    assert shown(state) == before


def test_the_whole_state_comes_back() -> None:
    source = make()
    checkpoint, state = save(source), make(1)
    restore, how = load(checkpoint, state)
    assert (restore.missing, restore.unexpected, how) == ((), (), "exact")
    assert shown(state) == shown(source)


def test_only_a_top_name_loads_that_and_nothing_else() -> None:
    checkpoint, state = save(make()), make(1)
    untouched = copy.deepcopy(state["optimizer"].state_dict())
    restore, how = load(checkpoint, state, only=["model"])
    assert how == "none"
    assert {leaf.name.partition(".")[0] for leaf in restore.tensors} == {"model"}
    assert torch.equal(state["model"][0].weight, checkpoint.tensors["model.0.weight"])
    assert repr(state["optimizer"].state_dict()) == repr(untouched)
    assert (state["step"], state["history"]) == (1, [1])


def test_only_a_prefix_is_whole_components() -> None:
    checkpoint, state = save(make()), make(1)
    restore, _ = load(checkpoint, state, only=["model.0", "optimizer.state.exp_avg"])
    assert {leaf.name.rsplit(".", 2)[0] for leaf in restore.tensors} == {
        "model",
        "optimizer.state.exp_avg.model",
    }
    assert state["optimizer"].param_groups[0]["lr"] == 1.1
    assert all(leaf.name.endswith(("0.weight", "0.bias")) for leaf in restore.tensors if leaf.name.startswith("model"))


@pytest.mark.parametrize("only", [["modle"], ["mod"], ["model.9"], ["model", "stop"]])
def test_an_entry_of_only_that_names_nothing_is_an_error(only: list[str]) -> None:
    with pytest.raises(ConfigError, match="nothing in the live state"):
        load(save(make()), make(1), only=only)


@pytest.mark.parametrize("only", ["model", [], [""], [3]])
def test_only_is_a_list_of_names(only: Any) -> None:
    with pytest.raises(ConfigError, match="a list of names"):
        load(save(make()), make(1), only=only)


def test_a_state_of_fewer_names_loads_what_it_has() -> None:
    checkpoint = save(make())
    model = make(1)["model"]
    restore, _ = load(checkpoint, {"model": model})
    assert restore.unexpected == ()
    assert torch.equal(model[0].weight, checkpoint.tensors["model.0.weight"])


def test_missing_and_unexpected_names_are_errors_that_list_them() -> None:
    checkpoint = save({"model": nn.Linear(2, 2), "old": 1})
    state = {"model": nn.Sequential(nn.Linear(2, 2, bias=False)), "new": 2}
    before = state["model"][0].weight.detach().clone()
    with pytest.raises(StateMismatchError, match=r"lacks 'model\.0\.weight', 'new'.*has 'model\.weight'.*strict=False"):
        load(checkpoint, state)
    restore, _ = load(checkpoint, state, strict=False)
    assert restore.missing == ("model.0.weight", "new")
    assert set(restore.unexpected) == {"model.weight", "model.bias"}
    assert torch.equal(state["model"][0].weight, before)


def test_other_ranks_may_have_a_place_for_what_is_unexpected_here() -> None:
    stages = [{"model": nn.ModuleDict({str(rank): nn.Linear(2, 2)})} for rank in range(2)]
    checkpoint = save([LiveState(stage, rank=rank, world=2).flatten() for rank, stage in enumerate(stages)])
    restore, _ = load(checkpoint, stages[0], rank=0, world=2)
    assert set(restore.unexpected) == {"model.1.weight", "model.1.bias"}


def test_an_optimizer_of_another_stage_has_options_that_are_unexpected_here() -> None:
    state = make()
    checkpoint = save(state)
    half = {"model": state["model"], "optimizer": torch.optim.AdamW(state["model"][0].parameters())}
    with pytest.raises(StateMismatchError, match=r"'optimizer\.model\.1\.weight'"):
        load(checkpoint, half)
    load(checkpoint, half, strict=False)
    assert half["optimizer"].param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize(("arguments", "message"), [((3,), "not a int"), (([],), "not a list")], ids=["number", "list"])
def test_the_state_is_a_mapping(arguments: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LiveState(*arguments, rank=0, world=1)


def test_what_is_put_into_the_mapping_later_is_part_of_the_state() -> None:
    state: dict[str, Any] = {}
    live = LiveState(state, rank=0, world=1)
    state["model"] = nn.Linear(1, 1)
    assert [leaf.name for leaf in live.flatten().tensors] == ["model.weight", "model.bias"]
