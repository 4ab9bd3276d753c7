"""Regions and holders of live DTensors, rank by rank (TRAPS 1, 2, 3)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from dscheck.errors import StateError
from dscheck.layout.region import Region
from dscheck.state import FlatState, LiveState, Proof, TensorLeaf
from tests.state.fake_ranks import fake_rank, forked, on_each, on_rank
from tests.state.roundtrip import Checkpoint, load, parts, save

RANKS = 8


def indices(*shape: int) -> torch.Tensor:
    """A tensor whose every element is its own flat index: a part of it shows which elements it is."""
    return torch.arange(math.prod(shape), dtype=torch.float32).view(shape)


def flatten(state: dict[str, Any], rank: int, world: int) -> FlatState:
    """The state with copies of its memory and without its optimizers: what can leave its process."""
    flat = LiveState(state, rank=rank, world=world, rng=False).flatten()
    flat.tensors = [replace(leaf, owned_by=None) for leaf in flat.tensors]
    flat.locals = [local.detach().clone() for local in flat.locals]
    return flat


CUTS: list[tuple[tuple[int, ...], tuple[int, ...], list[Any]]] = [
    ((9, 3), (4,), [Shard(0)]),
    ((9, 3), (4,), [Shard(-1)]),
    ((1, 4), (4,), [Shard(0)]),
    ((3,), (2,), [Replicate()]),
    ((), (2,), [Replicate()]),
    ((0, 4), (2,), [Shard(0)]),
    ((7, 5), (2, 2), [Shard(0), Shard(0)]),
    ((7, 5), (2, 3), [Shard(1), Shard(0)]),
    ((7, 5), (3, 2), [Replicate(), Shard(1)]),
    ((7, 5, 3), (2, 2, 2), [Shard(2), Replicate(), Shard(0)]),
    ((4, 4), (2, 2), [Replicate(), Shard(0)]),
    ((4, 4), (2, 2), [Shard(0), Shard(1)]),
    ((4, 4), (2, 2), [Replicate(), Replicate()]),
]


@pytest.fixture(scope="module")
def cuts() -> list[list[FlatState]]:
    """Each tensor of CUTS, with its elements, on each rank of its mesh."""

    def run(rank: int) -> list[FlatState | None]:
        found: list[FlatState | None] = []
        for shape, mesh_shape, placements in CUTS:
            flat = None
            if rank < (world := math.prod(mesh_shape)):
                with fake_rank(rank, world):
                    mesh = init_device_mesh("cpu", mesh_shape)
                    tensor = distribute_tensor(indices(*shape), mesh, placements, src_data_rank=None)
                    flat = flatten({"x": tensor}, rank, world)
            found.append(flat)
        return found

    ranks = forked(RANKS, run)
    return [[flat for flat in flats if flat is not None] for flats in zip(*ranks, strict=True)]


def test_every_part_holds_the_elements_of_its_region(cuts: list[list[FlatState]]) -> None:
    for (shape, mesh_shape, _), flats in zip(CUTS, cuts, strict=True):
        assert len(flats) == math.prod(mesh_shape)
        whole = indices(*shape)
        for flat in flats:
            assert (flat.tensors[0].cut.shape, flat.tensors[0].cut.proof) == (shape, Proof.MESH)
            for part in parts(flat)["x"]:
                assert part.region.numel
                assert torch.equal(part.view, whole[part.region.slices()] if shape else whole)


def test_holders_are_the_ranks_along_the_replicated_dimensions(cuts: list[list[FlatState]]) -> None:
    holders = [[flat.tensors[0].cut.holders for flat in flats] for flats in cuts[-3:]]
    assert holders == [[(0, 2), (1, 3), (0, 2), (1, 3)], [(0,), (1,), (2,), (3,)], [(0, 1, 2, 3)] * 4]


def test_ranks_of_a_submesh_are_global_ranks() -> None:
    def run(rank: int) -> tuple[int, ...]:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))["dp"]
        return (
            flatten({"x": distribute_tensor(indices(4), mesh, [Replicate()], src_data_rank=None)}, rank, 4)
            .tensors[0]
            .cut.holders
        )

    assert on_each(4, run) == [(0, 2), (1, 3), (0, 2), (1, 3)]


def test_the_mesh_coordinate_is_told_by_name() -> None:
    def run(rank: int) -> tuple[tuple[str, int], ...]:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        return flatten(
            {"x": distribute_tensor(indices(4), mesh, [Shard(0), Replicate()], src_data_rank=None)}, rank, 4
        ).mesh

    assert on_each(4, run)[2] == (("dp", 1), ("tp", 0))


def alone(rank: int, world: int) -> Any:
    """Run a test as one rank of several, in a process of its own."""

    def decorate(test: Any) -> Any:
        def run() -> None:
            on_rank(rank, world, lambda _: test())

        run.__name__ = test.__name__
        return run

    return decorate


@alone(2, 3)
def test_a_rank_outside_the_mesh_holds_nothing() -> None:
    mesh = DeviceMesh("cpu", [0, 1])
    tensor = DTensor.from_local(torch.empty(0), mesh, [Shard(0)], run_check=False, shape=(4,), stride=(1,))
    (leaf,) = flatten({"x": tensor}, 2, 3).tensors
    assert (leaf.cut.pieces, leaf.cut.holders, leaf.cut.shape) == ((), (), (4,))


@alone(0, 2)
def test_partial_is_refused_by_name() -> None:
    tensor = DTensor.from_local(torch.ones(4), init_device_mesh("cpu", (2,)), [Partial()], run_check=False)
    with pytest.raises(StateError, match=r"'x' has placement P.*redistribute it"):
        flatten({"x": tensor}, 0, 2)


@alone(1, 2)
def test_a_bare_strided_shard_is_several_boxes() -> None:
    mesh = init_device_mesh("cpu", (2,))
    local = torch.tensor([2.0, 3.0, 6.0, 7.0])
    placements = [_StridedShard(0, split_factor=2)]
    tensor = DTensor.from_local(local, mesh, placements, run_check=False, shape=(8,), stride=(1,))
    found = parts(flatten({"x": tensor}, 1, 2))["x"]
    assert [part.region for part in found] == [Region((2,), (4,)), Region((6,), (8,))]
    for part in found:
        assert torch.equal(part.view, indices(8)[part.region.slices()])


@alone(0, 2)
def test_a_local_shape_that_the_placements_do_not_say_is_refused_by_name() -> None:
    mesh = init_device_mesh("cpu", (2,))
    tensor = DTensor.from_local(torch.ones(2), mesh, [Shard(0)], run_check=False, shape=(7,), stride=(1,))
    with pytest.raises(StateError, match=r"'x' of shape \[7\].*should hold \[4\] and holds \[2\]"):
        flatten({"x": tensor}, 0, 2)


@alone(1, 2)
def test_padding_of_a_shard_is_not_read() -> None:
    model = fully_shard(nn.Linear(2, 3), mesh=init_device_mesh("cpu", (2,)))
    storage = model.weight._local_tensor.untyped_storage()
    assert storage.nbytes() > model.weight._local_tensor.numel() * 4
    (part,) = parts(flatten({"model": model}, 1, 2))["model.weight"]
    assert part.view.shape == (1, 2)


def parallel_model(mesh_shape: tuple[int, ...], rows: int, fill: bool) -> nn.Module:
    """FSDP2 (HSDP with three dimensions) over tensor parallelism, with sizes that nothing divides."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, rows), nn.Linear(rows, 3, bias=False))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(indices(*parameter.shape) + 1000 * number)
            parameter.mul_(fill)
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("rep", "dp", "tp")[-len(mesh_shape) :])
    if len(mesh_shape) > 1:
        plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
        parallelize_module(model, mesh["tp"], plan, src_data_rank=None)
        mesh = mesh["dp"] if len(mesh_shape) == 2 else mesh["rep", "dp"]
    return fully_shard(model, mesh=mesh)


def stepped(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer with state that shows where it belongs: the moment is 0.1 of the parameter."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    return optimizer


MESHES = [(1,), (3,), (2, 2), (4, 2), (2, 2, 2)]


def test_fsdp_over_tp_is_saved_in_any_layout_and_loaded_in_any_other() -> None:
    def saved_on(rank: int) -> dict[tuple[int, ...], FlatState]:
        flats = {}
        for mesh in MESHES:
            if rank < (world := math.prod(mesh)):
                with fake_rank(rank, world):
                    model = parallel_model(mesh, 9, True)
                    flats[mesh] = flatten({"model": model, "optimizer": stepped(model)}, rank, world)
        return flats

    saved = forked(RANKS, saved_on)
    checkpoints = [save([flats[mesh] for flats in saved if mesh in flats]) for mesh in MESHES]
    for checkpoint in checkpoints:
        assert torch.equal(checkpoint.tensors["model.0.weight"], indices(9, 5))
        assert torch.equal(checkpoint.tensors["model.1.weight"], indices(3, 9) + 2000)
        moment = checkpoint.tensors["optimizer.state.exp_avg.model.0.weight"]
        assert torch.allclose(moment, 0.1 * indices(9, 5))

    def loaded_on(rank: int) -> None:
        for mesh in MESHES:
            if rank < (world := math.prod(mesh)):
                with fake_rank(rank, world):
                    compare_loaded(checkpoints, mesh, rank)

    forked(RANKS, loaded_on)


def compare_loaded(checkpoints: list[Checkpoint], mesh: tuple[int, ...], rank: int) -> None:
    model, reference = parallel_model(mesh, 9, False), parallel_model(mesh, 9, True)
    expected = stepped(reference)
    for checkpoint in checkpoints:
        for live in model.parameters():
            live.detach().to_local().zero_()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
        load(checkpoint, {"model": model, "optimizer": optimizer}, rank=rank, world=math.prod(mesh), rng=False)
        for live, there in zip(model.parameters(), reference.parameters(), strict=True):
            assert torch.equal(live.to_local(), there.to_local())
            mine, theirs = optimizer.state[live], expected.state[there]
            assert mine.keys() == theirs.keys()
            assert torch.equal(mine["step"], theirs["step"])
            assert mine["exp_avg"].placements == theirs["exp_avg"].placements
            assert torch.equal(mine["exp_avg"].to_local(), theirs["exp_avg"].to_local())


def test_the_step_of_a_sharded_parameter_is_the_same_on_all_ranks_of_its_mesh() -> None:
    def run(rank: int) -> TensorLeaf:
        model = parallel_model((2, 2), 1, True)
        flat = flatten({"model": model, "optimizer": stepped(model)}, rank, 4)
        return next(leaf for leaf in flat.tensors if leaf.name == "optimizer.state.step.model.0.weight")

    for leaf in on_each(4, run):
        assert leaf.cut.holders == (0, 1, 2, 3)
        assert [region for region, _ in leaf.cut.pieces] == [Region((), ())]


@alone(0, 2)
def test_an_optimizer_tensor_of_unknown_part_is_refused_by_name() -> None:
    model = fully_shard(nn.Linear(4, 4, bias=False), mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state[model.weight]["row"] = torch.ones(4)
    with pytest.raises(StateError, match=r"'optimizer\.state\.row\.model\.weight' has shape \[4\]"):
        flatten({"model": model, "optimizer": optimizer}, 0, 2)


def test_factored_state_of_a_sharded_parameter_is_loaded_whole() -> None:
    def made(rank: int, step: bool) -> dict[str, Any]:
        torch.manual_seed(0)
        model = fully_shard(nn.Linear(4, 6, bias=False), mesh=init_device_mesh("cpu", (2,)))
        optimizer = torch.optim.SGD(model.parameters())
        if step:
            row = distribute_tensor(indices(6, 1), model.weight.device_mesh, [Replicate()], src_data_rank=None)
            optimizer.state[model.weight]["row"] = row
        return {"model": model, "optimizer": optimizer}

    checkpoint = save(on_each(2, lambda rank: flatten(made(rank, True), rank, 2)))

    def loaded(rank: int) -> torch.Tensor:
        state = made(rank, False)
        load(checkpoint, state, rank=rank, world=2, rng=False)
        value = state["optimizer"].state[state["model"].weight]["row"]
        assert isinstance(value, DTensor)
        return value.to_local()

    assert all(torch.equal(value, indices(6, 1)) for value in on_each(2, loaded))


class Holder:
    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def test_a_dtensor_in_an_object_is_a_tensor_by_its_mesh() -> None:
    def made(fill: float) -> dict[str, Any]:
        tensor = distribute_tensor(indices(5) * fill, init_device_mesh("cpu", (2,)), [Shard(0)], src_data_rank=None)
        return {"ema": Holder(tensor)}

    checkpoint = save(on_each(2, lambda rank: flatten(made(1.0), rank, 2)))
    assert torch.equal(checkpoint.tensors["ema.value"], indices(5))

    def loaded(rank: int) -> torch.Tensor:
        state = made(0.0)
        load(checkpoint, state, rank=rank, world=2, rng=False)
        return state["ema"].value.to_local()

    assert torch.equal(torch.cat(on_each(2, loaded)), indices(5))
    whole = Holder(None)
    load(checkpoint, {"ema": whole}, rng=False)
    assert torch.equal(whole.value, indices(5))


@alone(0, 2)
def test_nested_state_of_a_sharded_parameter_is_refused_by_name() -> None:
    model = fully_shard(nn.Linear(4, 4, bias=False), mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state[model.weight]["history"] = [torch.ones(3)]
    with pytest.raises(StateError, match=r"'optimizer\.state\.history\.model\.weight\.0' has shape \[3\]"):
        flatten({"model": model, "optimizer": optimizer}, 0, 2)
