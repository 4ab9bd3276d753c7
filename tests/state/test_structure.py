"""A flatten that only looks whether the structure is the same gives what a walk over all of the state would give."""

from __future__ import annotations

import gc
import random
import weakref
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dscheck.state import LiveState, per_rank, sharded
from tests.state.walks import Counted, State, stepped, walks_after


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("mask", torch.ones(3), persistent=False)


class Told(nn.Module):
    """Has extra state, which says what it is told."""

    told: Any = 1

    def get_extra_state(self) -> Any:
        return self.told

    def set_extra_state(self, state: Any) -> None:
        self.told = state


class Wrapper:
    """An optimizer in another one, as accelerate makes them."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.optimizer = inner

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    def step(self) -> None:
        self.optimizer.step()


def make() -> State:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), nn.Embedding(4, 3), Told())
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    stepped(optimizer)
    return {
        "model": model,
        "teacher": nn.Sequential(Block(), Block()),
        "optimizer": optimizer,
        "scheduler": scheduler,
        "wrapped": Wrapper(stepped(torch.optim.SGD([*model[0].parameters()], momentum=0.9))),
        "step": 1,
        "history": [1.0, {"loss": 2.0}],
        "nested": {"mean": torch.zeros(2), "more": [torch.ones(2), 3]},
        "part": sharded(torch.ones(2, 3), (4, 3), (0, 0)),
        "mine": per_rank({"position": 3}),
        "generators": OrderedDict(python=random.Random(1), numpy=np.random.default_rng(1), torch=torch.Generator()),
    }


def parameter(state: State) -> nn.Parameter:
    found: nn.Parameter = state["model"][0].linear.weight
    return found


def moments(state: State) -> dict[str, Any]:
    found: dict[str, Any] = state["optimizer"].state[parameter(state)]
    return found


def set_data(value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[State], Any]:
    """Give a parameter other memory, and keep the memory of before so that the new one has another address."""

    def change(state: State) -> torch.Tensor:
        before = parameter(state).detach()
        parameter(state).data = value(before)
        return before

    return change


CHANGES: dict[str, Callable[[State], Any]] = {
    "a parameter replaced": lambda s: setattr(s["teacher"][0].linear, "bias", nn.Parameter(torch.ones(3))),
    "a parameter registered": lambda s: s["model"].register_parameter("scale", nn.Parameter(torch.ones(1))),
    "a parameter removed": lambda s: setattr(s["teacher"][0].linear, "bias", None),
    "data with another address": set_data(torch.clone),
    "data with another shape at the address": set_data(lambda t: t[:2]),
    "data transposed": set_data(torch.t),
    "data of another dtype at the address": set_data(lambda t: t.view(torch.int32).view(torch.float32)[:, :1]),
    "a child replaced": lambda s: setattr(s["teacher"][1], "norm", nn.BatchNorm1d(3)),
    "a child added": lambda s: s["model"].add_module("4", nn.Linear(1, 1)),
    "a child removed": lambda s: s["model"].__delitem__(3),
    "a child under two names": lambda s: s["model"].__setitem__(3, s["model"][1]),
    "a buffer registered": lambda s: s["model"].register_buffer("seen", torch.zeros(1)),
    "a buffer made transient": lambda s: s["model"][0].norm._non_persistent_buffers_set.add("running_mean"),
    "a buffer made persistent": lambda s: s["model"][0]._non_persistent_buffers_set.clear(),
    "a buffer replaced": lambda s: setattr(s["model"][0].norm, "running_var", torch.full((3,), 2.0)),
    "weights tied": lambda s: setattr(s["teacher"][1].linear, "weight", s["model"][0].linear.weight),
    "a group added": lambda s: s["wrapped"].optimizer.add_param_group({"params": [*s["model"][1].parameters()]}),
    "groups reordered": lambda s: s["optimizer"].param_groups[0]["params"].reverse(),
    "state replaced": lambda s: moments(s).update(exp_avg=torch.ones(3, 3)),
    "state added": lambda s: moments(s).update(more=torch.ones(3, 3)),
    "state removed": lambda s: moments(s).pop("exp_avg"),
    "all state of a parameter removed": lambda s: s["optimizer"].state.pop(parameter(s)),
    "all state removed": lambda s: s["optimizer"].state.clear(),
    "state that is no tensor any more": lambda s: moments(s).update(step=3),
    "a name added": lambda s: s.update(more=1),
    "a name removed": lambda s: s.pop("step"),
    "a tensor added below": lambda s: s["nested"].update(new=torch.ones(1)),
    "a tensor exchanged below": lambda s: s["nested"].update(mean=torch.ones(2)),
    "an item added below": lambda s: s["nested"]["more"].append(4),
    "plain data that holds a tensor now": lambda s: s["history"].append(torch.ones(2)),
    "plain data that holds an object now": lambda s: s["history"].append(torch.Generator()),
    "plain data that is a tensor now": lambda s: s.update(step=torch.ones(())),
    "a number that is a text now": lambda s: s.update(step="one"),
    "another shard": lambda s: s.update(part=sharded(torch.ones(2, 3), (4, 3), (2, 0))),
    "a model exchanged": lambda s: (s.update(model=make()["model"]), s.pop("optimizer"), s.pop("wrapped")),
    "an optimizer exchanged": lambda s: s.update(optimizer=stepped(torch.optim.Adam(s["model"].parameters()))),
    "the optimizer in a wrapper exchanged": lambda s: setattr(
        s["wrapped"], "optimizer", torch.optim.SGD([parameter(s)], momentum=0.5)
    ),
    "a wrapper around an optimizer": lambda s: s.update(optimizer=Wrapper(s["optimizer"])),
    "forward that rewrites an embedding": lambda s: setattr(s["model"][2], "max_norm", 1.0),
    "per_rank of another type": lambda s: setattr(s["mine"], "value", [3]),
    "another order of the names": lambda s: s.update(step=s.pop("step")),
    "another class": lambda s: setattr(s["model"][0], "__class__", type("Other", (Block,), {})),
    "a hook of torch's": lambda s: torch.nn.utils.spectral_norm(s["model"][1].linear),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_another_structure_is_noticed(change: Callable[[State], Any]) -> None:
    assert walks_after(change, make()) == 1


def train(state: State) -> None:
    stepped(state["optimizer"])
    stepped(state["wrapped"].optimizer)
    state["scheduler"].step()
    state["model"][0].mask = torch.zeros(3)
    state["model"][0].norm(torch.randn(4, 3))


VALUES: dict[str, Callable[[State], Any]] = {
    "a step of training": train,
    "a learning rate": lambda s: s["optimizer"].param_groups[0].update(lr=0.5),
    "a new option": lambda s: s["optimizer"].param_groups[0].update(initial_lr=0.5),
    "a number": lambda s: s.update(step=2),
    "a longer list": lambda s: s["history"].append({"loss": 3.0, "more": [None]}),
    "extra state": lambda s: setattr(s["model"][3], "told", {"text": "new"}),
    "per_rank": lambda s: s["mine"].value.update(position=4),
    "random streams": lambda s: (random.random(), np.random.rand(), torch.rand(1)),
    "generators": lambda s: (s["generators"]["python"].random(), s["generators"]["numpy"].random()),
    "another object of the same kind": lambda s: s["generators"].update(python=random.Random(7)),
    "the bytes of a tensor": lambda s: parameter(s).data.mul_(2.0),
}


@pytest.mark.parametrize("change", VALUES.values(), ids=VALUES.keys())
def test_values_are_read_anew_without_a_walk(change: Callable[[State], Any]) -> None:
    assert walks_after(change, make()) == 0


def test_plain_state_of_an_optimizer_is_read_anew() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    for number, weight in enumerate(model.parameters()):
        optimizer.state[weight] = {"step": number, "seen": [0.5]}
    optimizer.state["whole"] = {"count": 1}

    def change(state: State) -> None:
        optimizer.state[model.weight]["step"] += 10
        optimizer.state[model.weight]["seen"].append(torch.ones(1))
        optimizer.state["whole"]["count"] = 2

    assert walks_after(change, {"model": model, "optimizer": optimizer}) == 0


def test_memory_in_other_places_keeps_the_list_of_tensors() -> None:
    """Optimizer state that was moved away and came back: its leaves, and what is planned for them, stay."""
    state = make()
    live = Counted(state, rank=0, world=1)
    before = live.flatten()
    for moments in state["optimizer"].state.values():
        moments.update({key: value.clone() for key, value in moments.items()})
    after = live.flatten()
    assert live.walks == 2
    assert after.tensors is before.tensors
    assert {t.data_ptr() for t in after.locals} != {t.data_ptr() for t in before.locals}


def test_leaves_that_lie_otherwise_in_memory_are_a_new_list() -> None:
    state: State = {"x": torch.ones(3, 3)}
    live = LiveState(state, rank=0, world=1)
    before = live.flatten()
    state["x"] = torch.ones(3, 3).t()
    after = live.flatten()
    assert after.tensors == before.tensors
    assert after.tensors is not before.tensors


@pytest.mark.parametrize(
    "drop",
    [
        lambda s: s.clear(),
        lambda s: s["optimizer"].state.clear(),
        lambda s: s.update(model=None, optimizer=None, wrapped=None, scheduler=None),
        lambda s: s["teacher"][0].linear.register_parameter("weight", None),
        lambda s: s["teacher"].pop(0),
    ],
    ids=["the whole state", "optimizer state", "the model", "a parameter", "a child"],
)
def test_nothing_dropped_is_kept_alive(drop: Callable[[State], Any]) -> None:
    state = make()
    live = LiveState(state, rank=0, world=1)
    live.flatten()
    live.flatten()
    kept = {id(t): weakref.ref(t) for t in live.flatten().locals}
    models = state["model"], state["teacher"]
    modules = [weakref.ref(module) for model in models for module in model.modules()]
    del models, state["wrapped"]
    drop(state)
    gc.collect()
    left = {id(t) for t in LiveState(state, rank=0, world=1).flatten().locals}
    assert {key for key, reference in kept.items() if reference() is not None} <= left
    alive = {id(module) for value in state.values() if isinstance(value, nn.Module) for module in value.modules()}
    assert {id(module) for reference in modules if (module := reference()) is not None} <= alive


def test_a_lifted_tensor_is_walked_to_each_time() -> None:
    held = SimpleNamespace(big=torch.ones(1 << 18))
    held.state_dict = lambda: {"big": held.big}
    held.load_state_dict = lambda saved: None
    state = {"ema": held, "step": 1}
    live = Counted(state, rank=0, world=1)
    before = live.flatten()
    held.big = torch.zeros(1 << 18)
    after = live.flatten()
    assert (live.walks, after.tensors is before.tensors) == (2, True)
    assert after.locals[0].data_ptr() == held.big.data_ptr()


def test_an_object_whose_tensor_grows_is_walked_to() -> None:
    held = SimpleNamespace(value=torch.ones(2))
    held.state_dict = lambda: {"value": held.value}
    held.load_state_dict = lambda saved: None
    assert walks_after(lambda s: None, {"x": torch.ones(1), "ema": held}) == 0
    live = Counted({"ema": held}, rank=0, world=1)
    assert live.flatten().tensors == []
    held.value = torch.ones(1 << 18)
    assert [leaf.name for leaf in live.flatten().tensors] == ["ema.value"]


def test_a_lazy_view_is_copied_anew_each_time() -> None:
    values = torch.tensor([1 + 2j, 3 - 1j])
    live = Counted({"x": values.conj()}, rank=0, world=1)
    first = live.flatten()
    values.mul_(2)
    second = live.flatten()
    assert (live.walks, second.tensors is first.tensors) == (2, True)
    assert torch.equal(second.locals[0], values.conj())
    assert not second.locals[0].is_conj()


def test_a_tensor_that_becomes_a_lazy_view_is_noticed() -> None:
    values = torch.tensor([1 + 2j, 3 - 1j])
    held = values.view(2)
    live = LiveState({"x": held}, rank=0, world=1)
    live.flatten()
    held.data = values.conj()
    assert torch.equal(live.flatten().locals[0], values.conj())
    assert not live.flatten().locals[0].is_conj()


class Own(nn.Linear):
    """Decides by itself what its state_dict holds."""

    whole = True

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        entries = super().state_dict(*args, **kwargs)
        if not self.whole:
            del entries[f"{kwargs['prefix']}bias"]
        return entries


def hooked() -> nn.Module:
    module = nn.Linear(2, 2)
    module.whole = True  # type: ignore[assignment]

    def hook(module: Any, entries: Any, prefix: str, metadata: Any) -> None:
        if not module.whole:
            del entries[f"{prefix}bias"]

    module.register_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]
    return module


@pytest.mark.parametrize("build", [lambda: Own(2, 2), hooked], ids=["a method", "a hook"])
def test_a_module_that_decides_what_it_stores_is_asked_each_time(build: Callable[[], Any]) -> None:
    module = build()
    live = Counted({"model": nn.Sequential(module)}, rank=0, world=1)
    assert len(live.flatten().tensors) == 2
    module.whole = False
    assert [leaf.name for leaf in live.flatten().tensors] == ["model.0.weight"]
    assert live.walks == 2


@pytest.mark.parametrize("register", ["register_state_dict_post_hook", "register_state_dict_pre_hook"])
def test_a_hook_put_on_a_module_later_is_noticed(register: str) -> None:
    """What it does is unknown: the module is asked each time from then on."""
    model = nn.Linear(2, 2)
    live = Counted({"model": model}, rank=0, world=1)
    live.flatten()
    getattr(model, register)(lambda *_: None)
    live.flatten()
    live.flatten()
    assert live.walks == 3


def test_a_state_dict_put_on_a_module_later_is_noticed() -> None:
    model = nn.Linear(2, 2)
    live = LiveState({"model": model}, rank=0, world=1)
    live.flatten()
    model.state_dict = lambda *args, **kwargs: {"weight": model.weight}  # type: ignore[method-assign]
    assert [leaf.name for leaf in live.flatten().tensors] == ["model.weight"]


def test_an_optimizer_that_is_gone_owns_nothing() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    flat = LiveState({"model": model, "optimizer": optimizer}, rank=0, world=1).flatten()
    assert flat.tensors[0].owner is optimizer
    del optimizer
    gc.collect()
    assert flat.tensors[0].owner is None
