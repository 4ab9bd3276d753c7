"""Optimizers by parameter name: no step, no cast, and bit-exact training afterwards (TRAPS 7, 8, 10, 11, 15)."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from dscheck.errors import StateError, StateMismatchError
from dscheck.state import LiveState
from tests.state.roundtrip import load, save


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def train(model: nn.Module, optimizer: Any, steps: int, dtype: torch.dtype = torch.float32) -> None:
    for step in range(steps):
        batch = torch.linspace(-1, 1 + step, 20).view(4, 5).to(dtype)

        def closure(batch: torch.Tensor = batch) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(batch).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


OPTIMIZERS = [
    (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}),
    (torch.optim.SGD, {"lr": 0.01}),
    (torch.optim.Adam, {"amsgrad": True}),
    (torch.optim.AdamW, {"fused": True}),
    (torch.optim.AdamW, {"lr": torch.tensor(0.01), "foreach": False, "capturable": False}),
    (torch.optim.Adamax, {}),
    (torch.optim.Adagrad, {}),
    (torch.optim.Adadelta, {}),
    (torch.optim.NAdam, {}),
    (torch.optim.RAdam, {}),
    (torch.optim.RMSprop, {"momentum": 0.5, "centered": True}),
    (torch.optim.Rprop, {}),
    (torch.optim.ASGD, {}),
    (torch.optim.Adafactor, {}),
    (torch.optim.LBFGS, {"lr": 0.1, "max_iter": 4, "history_size": 3}),
    (torch.optim.LBFGS, {"lr": 0.1, "max_iter": 4, "line_search_fn": "strong_wolfe"}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS, ids=lambda value: getattr(value, "__name__", None))
@pytest.mark.parametrize("fresh", [True, False])
def test_training_goes_on_bit_exactly(kind: Any, options: dict[str, Any], fresh: bool) -> None:
    model = make_model()
    optimizer = kind(model.parameters(), **copy.deepcopy(options))
    train(model, optimizer, 3)
    checkpoint = save({"model": model, "optimizer": optimizer})
    expected = copy.deepcopy(optimizer.state_dict())

    other = make_model(1)
    resumed = kind(other.parameters(), **copy.deepcopy(options))
    if not fresh:
        train(other, resumed, 5)
    load(checkpoint, {"model": other, "optimizer": resumed})

    assert same(resumed.state_dict(), expected)
    train(model, optimizer, 3)
    train(other, resumed, 3)
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


def test_flatten_and_load_do_not_step_a_fresh_optimizer() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    steps = []
    optimizer.register_step_pre_hook(lambda *_: steps.append(1))
    before = copy.deepcopy(model.state_dict())
    checkpoint = save({"model": model, "optimizer": optimizer})
    load(checkpoint, {"model": model, "optimizer": optimizer})
    assert not steps
    assert not optimizer.state
    assert same(dict(before), dict(model.state_dict()))


def test_state_that_was_absent_is_absent_again() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint = save({"model": model, "optimizer": optimizer})
    train(model, optimizer, 2)
    load(checkpoint, {"model": model, "optimizer": optimizer})
    assert not optimizer.state


def test_float32_moments_of_bfloat16_parameters_stay_float32() -> None:
    model = make_model(dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 1, torch.bfloat16)
    for state in optimizer.state.values():
        state["exp_avg"] = state["exp_avg"].float() + 1e-6
    checkpoint = save({"model": model, "optimizer": optimizer})
    other = make_model(1, torch.bfloat16)
    resumed = torch.optim.AdamW(other.parameters())
    load(checkpoint, {"model": other, "optimizer": resumed})
    for here, there in zip(model.parameters(), other.parameters(), strict=True):
        assert resumed.state[there]["exp_avg"].dtype == torch.float32
        assert torch.equal(resumed.state[there]["exp_avg"], optimizer.state[here]["exp_avg"])


def test_a_learning_rate_tensor_keeps_its_memory_and_gets_the_saved_value() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.5))
    checkpoint = save({"model": model, "optimizer": optimizer})
    rate = optimizer.param_groups[0]["lr"]
    rate.fill_(0.25)
    load(checkpoint, {"model": model, "optimizer": optimizer})
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.5


def test_a_learning_rate_tensor_is_read_inside_flatten() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.5))
    flat = LiveState({"model": model, "optimizer": optimizer}, rank=0, world=1).flatten()
    before = copy.deepcopy(flat.options)
    optimizer.param_groups[0]["lr"].fill_(0.25)
    assert flat.options == before


def test_a_number_that_was_saved_as_a_tensor_stays_a_number() -> None:
    model = make_model()
    checkpoint = save({"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.5))})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    load(checkpoint, {"model": model, "optimizer": optimizer})
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert type(optimizer.param_groups[0]["lr"]) is float


def test_how_a_step_is_computed_is_not_loaded() -> None:
    model = make_model()
    checkpoint = save({"model": model, "optimizer": torch.optim.AdamW(model.parameters(), fused=True)})
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    load(checkpoint, {"model": model, "optimizer": optimizer})
    assert optimizer.param_groups[0]["foreach"]
    assert not optimizer.param_groups[0]["fused"]


def two_groups(model: nn.Sequential, one: float, other: float) -> torch.optim.Optimizer:
    groups = [{"params": model[0].parameters(), "lr": one}, {"params": model[2].parameters(), "lr": other}]
    return torch.optim.SGD(groups, momentum=0.9)


def test_options_follow_the_parameter_into_other_groups() -> None:
    model = make_model()
    checkpoint = save({"model": model, "optimizer": two_groups(model, 0.1, 0.2)})
    groups = [{"params": [parameter]} for parameter in reversed(list(model.parameters()))]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    load(checkpoint, {"model": model, "optimizer": optimizer})
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.2, 0.1, 0.1]


def test_one_group_that_gets_two_saved_options_is_refused() -> None:
    model = make_model()
    checkpoint = save({"model": model, "optimizer": two_groups(model, 0.1, 0.2)})
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    with pytest.raises(StateMismatchError, match=r"'model\.0\.weight' and 'model\.2\.weight'.*\(lr\)"):
        load(checkpoint, {"model": model, "optimizer": optimizer})


def test_unfrozen_parameters_are_missing_by_name_and_stay_as_they_are_when_allowed() -> None:
    model = make_model()
    optimizer = torch.optim.Adagrad(model[2].parameters())
    train(model, optimizer, 1)
    checkpoint = save({"model": model, "optimizer": optimizer})
    later = torch.optim.Adagrad(model.parameters())
    with pytest.raises(StateMismatchError, match=r"'optimizer\.model\.0\.weight'"):
        load(checkpoint, {"model": model, "optimizer": later})
    restore, _ = load(checkpoint, {"model": model, "optimizer": later}, strict=False)
    assert restore.missing == ("optimizer.model.0.weight", "optimizer.model.0.bias")
    assert later.state[model[0].weight].keys() == {"step", "sum"}
    assert torch.equal(later.state[model[2].weight]["sum"], optimizer.state[model[2].weight]["sum"])


def test_an_unused_expert_has_no_state_before_and_after() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model[0].parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    checkpoint = save({"model": model, "optimizer": optimizer})
    resumed = torch.optim.AdamW(model.parameters())
    load(checkpoint, {"model": model, "optimizer": resumed})
    assert set(resumed.state) == set(model[0].parameters())


def test_a_parameter_outside_the_modules_is_named_by_named_parameters() -> None:
    loose = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([("loose", loose)], momentum=0.9)
    loose.grad = torch.full((3,), 2.0)
    optimizer.step()
    checkpoint = save({"optimizer": optimizer})
    assert "optimizer.state.momentum_buffer.loose" in checkpoint.tensors
    fresh = torch.optim.SGD([("loose", loose)], momentum=0.9)
    load(checkpoint, {"optimizer": fresh})
    assert torch.equal(fresh.state[loose]["momentum_buffer"], torch.full((3,), 2.0))


def test_a_parameter_without_a_name_is_refused() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(3))])
    with pytest.raises(StateError, match=r"parameter 0 of group 0, of shape \[3\].*named_parameters"):
        LiveState({"optimizer": optimizer}, rank=0, world=1).flatten()


class Accelerated(torch.optim.Optimizer):
    """Wraps like accelerate: an Optimizer by class, without hooks of its own."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)

    def step(self, closure: Any = None) -> None:
        self.optimizer.step(closure)


class Plain:
    """Wraps without being an Optimizer."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.param_groups, self.state = inner, inner.param_groups, inner.state

    def step(self) -> None:
        self.inner.step()


@pytest.mark.parametrize("wrap", [Accelerated, Plain, lambda inner: Accelerated(Accelerated(inner))])
def test_the_owner_is_the_optimizer_inside_whose_hooks_fire(wrap: Any) -> None:
    model = make_model()
    inner = torch.optim.AdamW(model.parameters())
    train(model, inner, 1)
    flat = LiveState({"model": model, "optimizer": wrap(inner)}, rank=0, world=1).flatten()
    assert {id(leaf.owner) for leaf in flat.tensors} == {id(inner)}


def test_a_wrapper_with_state_of_its_own_is_refused() -> None:
    model = make_model()
    wrapper = Plain(torch.optim.SGD(model.parameters()))
    wrapper.state = {"slow": torch.ones(2)}
    with pytest.raises(StateError, match="keeps state beside that of the SGD"):
        LiveState({"model": model, "optimizer": wrapper}, rank=0, world=1).flatten()


def test_owners_are_none_for_frozen_and_twice_stepped_parameters() -> None:
    model = make_model()
    model[0].weight.requires_grad_(False)
    one = torch.optim.SGD([model[0].bias, model[2].bias])
    other = torch.optim.SGD([model[2].weight, model[2].bias])
    third = torch.optim.SGD([model[2].bias])
    flat = LiveState({"model": model, "one": one, "other": other, "third": third}, rank=0, world=1).flatten()
    owners = {leaf.name: leaf.owner for leaf in flat.tensors}
    assert owners == {
        "model.0.weight": None,
        "model.0.bias": one,
        "model.2.weight": other,
        "model.2.bias": None,
    }


@pytest.mark.parametrize("layer", [nn.Embedding(5, 3, max_norm=1.0), nn.EmbeddingBag(5, 3, max_norm=1.0)])
def test_a_weight_that_forward_rewrites_has_no_owner(layer: nn.Module) -> None:
    optimizer = torch.optim.SGD(layer.parameters())
    (leaf,) = LiveState({"model": layer, "optimizer": optimizer}, rank=0, world=1).flatten().tensors
    assert leaf.owner is None


def test_plain_state_and_state_of_the_whole_optimizer_come_back() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state["calls"] = 7
    optimizer.state[model[0].weight].update(step=3, history=[torch.ones(2), (1, None)])
    checkpoint = save({"model": model, "optimizer": optimizer})
    fresh = torch.optim.SGD(model.parameters())
    load(checkpoint, {"model": model, "optimizer": fresh})
    assert fresh.state["calls"] == 7
    assert same(fresh.state[model[0].weight], {"step": 3, "history": [torch.ones(2), (1, None)]})


@pytest.mark.parametrize(
    ("saved", "live"), [(torch.optim.AdamW, torch.optim.SGD), (torch.optim.SGD, torch.optim.AdamW)]
)
def test_the_options_of_another_class_are_refused(saved: Any, live: Any) -> None:
    model = make_model()
    checkpoint = save({"model": model, "optimizer": saved(model.parameters())})
    optimizer = live(model.parameters())
    with pytest.raises(StateMismatchError, match=rf"another class.* {live.__name__} .*'(betas|momentum)'.*make the"):
        load(checkpoint, {"model": model, "optimizer": optimizer})
    load(checkpoint, {"model": model, "optimizer": optimizer}, only=["model"])


def test_options_that_a_version_of_torch_adds_are_no_other_class() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    checkpoint = save({"model": model, "optimizer": optimizer})
    optimizer.param_groups[0].update(lr=0.1, added_later=True)
    optimizer.param_groups[0]["initial_lr"] = 0.5
    load(checkpoint, {"model": model, "optimizer": optimizer})
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["added_later"]


def test_options_that_contradict_each_other_are_a_conflict_by_name_and_not_missing() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    train(model, optimizer, 1)
    state = {"model": model, "optimizer": optimizer}
    saved = save(state).seen_by(0, 1)
    options = {name: value for name, value in saved.options["optimizer"].items() if name != "model.0.weight"}
    saved = replace(saved, options={"optimizer": options}, conflicted=frozenset({"optimizer.model.0.weight"}))
    live = LiveState(state, rank=0, world=1)
    for strict in (True, False):
        with pytest.raises(StateMismatchError, match=r"options of 'optimizer\.model\.0\.weight' differ") as caught:
            live.prepare(saved, strict=strict)
        assert caught.value.names == ["optimizer.model.0.weight"]
    assert not live.prepare(saved, only=["model"]).missing
    names = {leaf.name for leaf in live.prepare(saved, only=["optimizer.state"]).tensors}
    assert "optimizer.state.momentum_buffer.model.0.weight" in names


def test_groups_without_parameters_get_their_options_by_position() -> None:
    model = make_model()

    def make(*rates: float) -> dict[str, Any]:
        groups = [{"params": []}, {"params": model.parameters()}, {"params": []}]
        return {
            "model": model,
            "optimizer": torch.optim.SGD([{**group, "lr": rate} for group, rate in zip(groups, rates, strict=False)]),
        }

    checkpoint = save(make(0.1, 0.2, 0.3))
    for live, expected in ((make(1, 1, 1), [0.1, 0.2, 0.3]), (make(1, 1), [1, 0.2])):
        restore, _ = load(checkpoint, live)
        assert [group["lr"] for group in live["optimizer"].param_groups] == expected
        assert not restore.unexpected
