"""Modules: clean names, live memory, ties, buffers and extra state (TRAPS 5, 6, 9, 10, 12, 18)."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dscheck.errors import StateError, StateMismatchError
from dscheck.state import FlatState, LiveState, Proof, TensorLeaf, sharded
from tests.state.roundtrip import load, parts, save


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def flatten(state: dict[str, Any]) -> FlatState:
    return LiveState(state, rank=0, world=1).flatten()


def leaves(state: dict[str, Any]) -> dict[str, TensorLeaf]:
    return {leaf.name: leaf for leaf in flatten(state).tensors}


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)  # a user's own "module" is a name like any other
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.module(x)
        return result


NAMES = {"model.0.module.weight", "model.0.module.bias", "model.0.kept"}


def test_names_are_those_of_the_bare_module() -> None:
    assert leaves({"model": nn.Sequential(Inner())}).keys() == NAMES


def test_non_persistent_buffers_are_no_state() -> None:
    assert "model.0.scratch" not in leaves({"model": nn.Sequential(Inner())})


def test_compile_adds_nothing_to_names() -> None:
    assert leaves({"model": torch.compile(nn.Sequential(Inner()))}).keys() == NAMES
    assert leaves({"model": nn.Sequential(torch.compile(Inner()))}).keys() == NAMES


def test_checkpointed_and_data_parallel_layers_add_nothing_to_names() -> None:
    assert leaves({"model": nn.Sequential(checkpoint_wrapper(Inner()))}).keys() == NAMES
    assert leaves({"model": nn.DataParallel(nn.Sequential(Inner()))}).keys() == NAMES
    assert leaves({"model": nn.Sequential(nn.DataParallel(checkpoint_wrapper(Inner())))}).keys() == NAMES
    below = checkpoint_wrapper(nn.Sequential(nn.DataParallel(Inner())))
    assert leaves({"model": below}).keys() == NAMES


@pytest.mark.usefixtures("one_rank")
def test_ddp_adds_nothing_to_names_and_tells_parameters_from_buffers() -> None:
    found = leaves({"model": DistributedDataParallel(nn.Sequential(Inner()))})
    assert found.keys() == NAMES
    assert {name: leaf.cut.proof for name, leaf in found.items()} == {
        "model.0.module.weight": Proof.MESH,
        "model.0.module.bias": Proof.MESH,
        "model.0.kept": Proof.FIRST,
    }


@pytest.mark.usefixtures("one_rank")
def test_what_ddp_ignores_is_only_a_claim() -> None:
    model = nn.Sequential(Inner())
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["0.module.bias", "0.kept"])
    found = leaves({"model": torch.compile(DistributedDataParallel(model))})
    assert {name: leaf.cut.proof for name, leaf in found.items()} == {
        "model.0.module.weight": Proof.MESH,
        "model.0.module.bias": Proof.CLAIM,
        "model.0.kept": Proof.CLAIM,
    }


def test_a_plain_module_is_a_claim_of_this_rank() -> None:
    flat = LiveState({"model": Inner()}, rank=3, world=4).flatten()
    assert {(leaf.cut.proof, leaf.cut.holders) for leaf in flat.tensors} == {(Proof.CLAIM, (3,))}


def test_two_keys_that_clean_to_one_name_are_refused() -> None:
    with pytest.raises(StateError, match=r"two values of the state are called 'model\.weight'"):
        flatten({"model": nn.Linear(1, 1, bias=False), "model.weight": torch.ones(1)})


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight


def test_tied_parameters_are_one_tensor_with_two_names() -> None:
    (leaf,) = flatten({"model": Tied()}).tensors
    assert (leaf.name, leaf.aliases) == ("model.embed.weight", ("model.head.weight",))


def test_parameters_that_share_memory_are_tied_too() -> None:
    model = Tied()
    model.head.weight = nn.Parameter(model.embed.weight.detach())
    (leaf,) = flatten({"model": model}).tensors
    assert leaf.aliases == ("model.head.weight",)


def test_one_memory_cut_in_two_ways_is_two_tensors() -> None:
    local = torch.zeros(2, 3)
    found = leaves({"whole": local, "part": sharded(local, (4, 3), (0, 0))})
    assert {name: leaf.cut.shape for name, leaf in found.items()} == {"whole": (2, 3), "part": (4, 3)}


def test_a_view_of_a_part_is_a_tensor_of_its_own() -> None:
    whole = torch.arange(6.0)
    found = leaves({"whole": whole, "part": whole[:3]})
    assert found.keys() == {"whole", "part"}


def test_untied_names_both_load_what_was_tied() -> None:
    model = Tied()
    checkpoint = save({"model": model})
    other = Tied()
    other.head.weight = nn.Parameter(torch.zeros(4, 3))
    load(checkpoint, {"model": other})
    assert torch.equal(other.head.weight, model.embed.weight)
    assert torch.equal(other.embed.weight, model.embed.weight)


def test_a_tie_loads_into_the_same_tie() -> None:
    model, other = Tied(), Tied()
    restore, _ = load(save({"model": model}), {"model": other})
    assert torch.equal(other.embed.weight, model.embed.weight)
    assert (restore.missing, restore.unexpected) == ((), ())


def test_two_saved_tensors_into_tied_memory_is_an_error_that_names_both() -> None:
    model = Tied()
    model.head.weight = nn.Parameter(torch.zeros(4, 3))
    checkpoint = save({"model": model})
    with pytest.raises(StateMismatchError, match=r"'model\.embed\.weight', 'model\.head\.weight' are tied here"):
        load(checkpoint, {"model": Tied()})


def test_only_chooses_between_two_saved_tensors_for_a_tie() -> None:
    model = Tied()
    model.head.weight = nn.Parameter(torch.zeros(4, 3))
    checkpoint = save({"model": model})
    other = Tied()
    load(checkpoint, {"model": other}, only=["model.head"])
    assert torch.equal(other.embed.weight, torch.zeros(4, 3))


def test_a_tie_loads_from_whichever_name_was_saved() -> None:
    model = Tied()
    checkpoint = save({"model": nn.ModuleDict({"head": model.head})})
    other = Tied()
    load(checkpoint, {"model": other})
    assert torch.equal(other.embed.weight, model.embed.weight)


def test_a_loaded_parameter_is_the_same_object_and_memory() -> None:
    model = nn.Linear(2, 3)
    checkpoint = save({"model": model})
    weight, pointer, expected = model.weight, model.weight.data_ptr(), model.weight.detach().clone()
    weight.detach().zero_()
    load(checkpoint, {"model": model})
    assert model.weight is weight
    assert weight.data_ptr() == pointer
    assert torch.equal(weight, expected)


def test_the_view_keeps_the_old_bytes_when_data_is_replaced() -> None:
    model = nn.Linear(2, 3, bias=False)
    old = model.weight.detach().clone()
    (part,) = parts(flatten({"model": model}))["model.weight"]
    model.weight.data = torch.zeros(3, 2)
    assert torch.equal(part.view, old)


class Extra(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def get_extra_state(self) -> Any:
        return self.value

    def set_extra_state(self, state: Any) -> None:
        self.value = state


@pytest.mark.parametrize(
    "value",
    [pickle.dumps({"any": "thing"}), {"amax": [1.0, float("inf")], "steps": (3, 4)}, torch.arange(3), None],
    ids=["pickle", "plain", "tensor", "none"],
)
def test_extra_state_comes_back_as_it_was(value: Any) -> None:
    checkpoint = save({"model": torch.compile(nn.ModuleDict({"fp8": Extra(value)}))})
    assert list(checkpoint.flats[0].ours) == ["model.fp8._extra_state"]
    other = Extra("untouched")
    load(checkpoint, {"model": nn.ModuleDict({"fp8": other})})
    assert type(other.value) is type(value)
    assert torch.equal(other.value, value) if isinstance(value, torch.Tensor) else other.value == value


def test_large_extra_state_is_a_tensor_of_the_checkpoint() -> None:
    value = torch.arange(1 << 18, dtype=torch.float32)
    checkpoint = save({"model": Extra(value)})
    assert list(checkpoint.tensors) == ["model._extra_state"]
    other = Extra(torch.zeros(3))
    load(checkpoint, {"model": other})
    assert torch.equal(other.value, value)


class Hooked(nn.Linear):
    """Adds to its state_dict what is no parameter."""

    def __init__(self, make: Any) -> None:
        super().__init__(2, 2)
        self.register_state_dict_post_hook(
            lambda module, state, prefix, meta: state.update({prefix + "more": make(self)})
        )


def test_a_computed_entry_is_refused_by_name() -> None:
    with pytest.raises(StateError, match=r"'model\.more' is computed by a state_dict hook of Hooked"):
        flatten({"model": Hooked(lambda module: module.weight.detach() * 2)})
    with pytest.raises(StateError, match=r"'model\.more' .* is a int, not a tensor"):
        flatten({"model": Hooked(lambda module: 3)})


def test_a_view_in_the_state_dict_is_live_memory() -> None:
    model = Hooked(lambda module: module.weight[:1])
    checkpoint = save({"model": model})
    expected = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.zero_()
    with pytest.raises(StateMismatchError, match=r"'model\.\w+' and 'model\.\w+' are partly the same memory"):
        load(checkpoint, {"model": model})
    load(checkpoint, {"model": model}, only=["model.more"])
    assert torch.equal(model.weight[:1], expected[:1])
    assert not model.weight[1:].any()


def raising(*_: Any) -> Any:
    raise ValueError("out of luck")


def test_what_the_users_own_code_raises_names_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Extra(1)
    checkpoint = save({"model": model})
    monkeypatch.setattr(Extra, "set_extra_state", raising)
    with pytest.raises(
        StateError, match=r"'model\._extra_state': Extra\.set_extra_state\(\) raised ValueError: out of"
    ):
        load(checkpoint, {"model": model})
    monkeypatch.setattr(Extra, "get_extra_state", raising)
    with pytest.raises(StateError, match=r"'model': Extra\.state_dict\(\) raised ValueError") as caught:
        save({"model": model})
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.usefixtures("one_rank")
def test_fsdp1_is_refused() -> None:
    with pytest.raises(StateError, match=r"FSDP1.*use fully_shard"):
        flatten({"model": FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu"))})


def sharded_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(2, 2))
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("dp",))
    fully_shard(model[1], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def evaluate(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(torch.ones(3, 4))
        return result


@pytest.mark.usefixtures("one_rank")
def test_after_an_eval_forward_the_sharded_parameters_are_saved_and_stay_gathered() -> None:
    model = sharded_model()
    optimizer = torch.optim.AdamW(model.parameters())
    before = parts(flatten({"model": model, "optimizer": optimizer}))
    evaluate(model)
    gathered = model[0].weight
    assert not isinstance(gathered, DTensor)
    flat = flatten({"model": model, "optimizer": optimizer})
    assert model[0].weight is gathered
    assert all(leaf.owner is optimizer and leaf.cut.proof is Proof.MESH for leaf in flat.tensors)
    after = parts(flat)
    assert after.keys() == before.keys()
    for name, (part,) in after.items():
        assert part.view.data_ptr() == before[name][0].view.data_ptr()


@pytest.mark.usefixtures("one_rank")
def test_a_load_after_an_eval_forward_reaches_the_next_forward() -> None:
    model = sharded_model()
    checkpoint = save({"model": model})
    expected = evaluate(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.reshard()
    for parameter in model.parameters():
        parameter.detach().to_local().fill_(3.0)
    assert not torch.equal(evaluate(model), expected)
    assert not isinstance(model[0].weight, DTensor)
    load(checkpoint, {"model": model})
    assert torch.equal(evaluate(model), expected)


@pytest.mark.usefixtures("one_rank")
def test_a_compiled_fsdp_model_is_flattened_after_an_eval_forward() -> None:
    model = sharded_model()
    evaluate(model)
    assert leaves({"model": nn.ModuleDict({"a": torch.compile(model)})}).keys() >= {"model.a.0.weight"}


@pytest.mark.usefixtures("one_rank")
def test_fsdp_training_goes_on_bit_exactly() -> None:
    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.ones(3, 4)).square().sum().backward()
            optimizer.step()

    model = sharded_model()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 2)
    checkpoint = save({"model": model, "optimizer": optimizer})
    other = sharded_model()
    resumed = torch.optim.AdamW(other.parameters())
    load(checkpoint, {"model": other, "optimizer": resumed})
    train(model, optimizer, 3)
    train(other, resumed, 3)
    for here, there in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(here.to_local(), there.to_local())
        assert isinstance(resumed.state[there]["exp_avg"], DTensor)
