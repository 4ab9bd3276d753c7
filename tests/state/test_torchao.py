"""Wrapper subclasses as torchao makes them: quantized weights, moments of 8 and 4 bits, sharded ones too (TRAPS 12)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dscheck.errors import StateMismatchError
from dscheck.state import LiveState
from tests.snapshot.training import differences, image
from tests.state.fake_ranks import on_each
from tests.state.roundtrip import load, save

pytest.importorskip("torchao")
from torchao import optim, quantization

MOMENTS = [optim.AdamW8bit, optim.AdamW4bit, optim.AdamWFp8]
WEIGHTS = [
    quantization.Int8WeightOnlyConfig(version=2),
    quantization.Float8WeightOnlyConfig(version=2),
    quantization.Int8DynamicActivationInt8WeightConfig(version=2),
]


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """Each of torchao's steps would compile for half a minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


def trained(make: Callable[..., Any], steps: int, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Linear(256, 64)
    optimizer = make(model.parameters())
    for _ in range(steps):
        model(torch.randn(3, 256)).sum().backward()
        optimizer.step()
    return {"model": model, "optimizer": optimizer}


@pytest.mark.parametrize("make", MOMENTS)
def test_quantized_moments_come_back_bit_for_bit(make: Callable[..., Any]) -> None:
    state = trained(make, 3, seed=0)
    fresh = trained(make, 1, seed=1)
    load(save(state), fresh)
    assert differences(image(state), image(fresh)) == []


def test_moments_of_another_width_are_refused_by_name() -> None:
    with pytest.raises(StateMismatchError, match=r"exp_avg\.model\.weight', a torchao.*OptimStateFp8, differs"):
        load(save(trained(optim.AdamW8bit, 1, seed=0)), trained(optim.AdamWFp8, 1, seed=1))


@pytest.mark.parametrize("config", WEIGHTS, ids=lambda config: type(config).__name__)
def test_quantized_weights_come_back_bit_for_bit(config: Any) -> None:
    def quantized(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(256, 64))
        quantization.quantize_(model, config)
        return model

    saved, live = quantized(0), quantized(1)
    load(save({"model": saved}), {"model": live})
    assert differences(image(saved), image(live)) == []


def test_sharded_8_bit_moments_come_back_on_as_many_ranks() -> None:
    def shard(rank: int, seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = fully_shard(nn.Linear(256, 64, bias=False), mesh=init_device_mesh("cpu", (2,)))
        optimizer = optim.AdamW8bit(model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) * (rank + 1)
        optimizer.step()
        return {"model": model, "optimizer": optimizer}

    def moments(state: dict[str, Any]) -> Any:
        (found,) = state["optimizer"].state.values()
        return {key: image(value._local_tensor) for key, value in found.items() if key != "step"}

    def saved(rank: int) -> Any:
        state = shard(rank, seed=0)
        flat = LiveState(state, rank=rank, world=2, rng=False).flatten()
        flat.tensors = [replace(leaf, owned_by=None) for leaf in flat.tensors]  # what can leave its process
        flat.locals = [local.detach().clone() for local in flat.locals]
        return flat, moments(state)

    first = on_each(2, saved)
    checkpoint = save([flat for flat, _ in first])

    def again(rank: int) -> Any:
        state = shard(rank, seed=1)
        load(checkpoint, state, rank=rank, world=2)
        return moments(state)

    for (_, expected), loaded in zip(first, on_each(2, again), strict=True):
        assert differences(expected, loaded) == []
