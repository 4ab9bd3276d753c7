"""The same on an accelerator: where new optimizer state and tensors of objects have to lie."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from dscheck.manifest.later import make_now
from dscheck.manifest.objects import decode_object
from dscheck.state import LiveState
from dscheck.state.objects import from_array
from tests.state.roundtrip import load, save

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

OPTIMIZERS: list[tuple[Any, dict[str, Any]]] = [
    (torch.optim.AdamW, {"fused": True}),
    (torch.optim.AdamW, {"capturable": True}),
    (torch.optim.AdamW, {"foreach": True}),
    (torch.optim.AdamW, {"foreach": False}),
    (torch.optim.AdamW, {"fused": True, "lr": 0.01}),
    (torch.optim.NAdam, {}),
    (torch.optim.ASGD, {}),
    (torch.optim.Adagrad, {}),
    (torch.optim.Adafactor, {}),
    (torch.optim.SGD, {"momentum": 0.9, "fused": True}),
    (torch.optim.LBFGS, {"lr": 0.1, "max_iter": 4, "history_size": 3}),
]


def make(kind: Any, options: dict[str, Any], seed: int = 0, rate: bool = False) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(), nn.Linear(7, 3)).cuda()
    lr = {"lr": torch.tensor(0.01, device="cuda")} if rate else {}
    optimizer = kind(model.parameters(), **copy.deepcopy(options), **lr)
    return {"model": model, "optimizer": optimizer, "scheduler": lr_scheduler.MultiStepLR(optimizer, [2, 4, 5])}


def train(state: dict[str, Any], steps: int) -> None:
    model, optimizer = state["model"], state["optimizer"]
    for step in range(steps):
        batch = torch.linspace(-1, 1 + step, 20, device="cuda").view(4, 5)

        def closure(batch: torch.Tensor = batch) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(batch).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        state["scheduler"].step()


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS, ids=lambda value: getattr(value, "__name__", None))
@pytest.mark.parametrize("fresh", [True, False])
def test_training_goes_on_bit_exactly(kind: Any, options: dict[str, Any], fresh: bool) -> None:
    live = make(kind, options)
    train(live, 3)
    checkpoint = save(live)
    train(live, 3)
    resumed = make(kind, options, 1)
    train(resumed, 0 if fresh else 2)
    assert load(checkpoint, resumed)[1] == "exact"
    train(resumed, 3)
    for here, there in zip(live["model"].state_dict().values(), resumed["model"].state_dict().values(), strict=True):
        assert torch.equal(here, there)


def test_a_learning_rate_on_the_device_stays_there_and_the_scheduler_moves_it() -> None:
    live = make(torch.optim.AdamW, {"capturable": True, "foreach": True}, rate=True)
    train(live, 3)
    checkpoint = save(live)
    train(live, 2)
    resumed = make(torch.optim.AdamW, {"capturable": True, "foreach": True}, 1, rate=True)
    rate = resumed["optimizer"].param_groups[0]["lr"]
    load(checkpoint, resumed)
    train(resumed, 2)
    assert resumed["optimizer"].param_groups[0]["lr"] is rate
    assert torch.equal(rate, live["optimizer"].param_groups[0]["lr"])


class Holder:
    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> Any:
        return {"value": self.value}

    def load_state_dict(self, state: Any) -> None:
        self.value = state["value"]


@pytest.mark.parametrize("count", [3, 1 << 20])
def test_tensors_of_an_object_come_back_to_the_device_they_lie_on(count: int) -> None:
    checkpoint = save({"holder": Holder(torch.ones(count, device="cuda"))})
    other = Holder(torch.zeros(count, device="cuda"))
    load(checkpoint, {"holder": other})
    assert other.value.is_cuda
    assert other.value.unique().tolist() == [1.0]


def test_options_and_objects_on_the_device_are_those_of_the_call_which_waits_for_no_kernel() -> None:
    lr = torch.tensor(0.5, device="cuda")
    model = nn.Linear(2, 2, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, capturable=True)
    live = LiveState({"model": model, "optimizer": optimizer, "holder": Holder(lr)}, rank=0, world=1)
    live.flatten()
    torch.cuda.synchronize()
    torch.cuda._sleep(1 << 28)
    flat = live.flatten()
    assert not torch.cuda.current_stream().query()
    lr.fill_(1.0)
    for stored in (flat.options["optimizer"]["model.weight"]["lr"], flat.ours["holder"]["value"]):
        assert decode_object(make_now(stored), array=from_array).item() == 0.5


def test_a_generator_of_the_device_goes_on() -> None:
    generator = torch.Generator("cuda").manual_seed(3)
    torch.rand(3, generator=generator, device="cuda")
    checkpoint = save({"generator": generator})
    expected = torch.rand(3, generator=generator, device="cuda")
    other = torch.Generator("cuda")
    load(checkpoint, {"generator": other})
    assert torch.equal(torch.rand(3, generator=other, device="cuda"), expected)
