"""What a cached structure must notice of DTensor, FSDP2 and DDP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from dscheck.state import LiveState, Proof
from tests.state.walks import Counted, State, assert_same, stepped, walks_after


@pytest.fixture
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


pytestmark = pytest.mark.usefixtures("one_rank")


def placed(tensor: torch.Tensor) -> DTensor:
    return distribute_tensor(tensor, init_device_mesh("cpu", (1,)), [Shard(0)])


def sharded_state() -> State:
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (1,))
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    for module in (model[1], model):
        fully_shard(module, mesh=mesh)
    model(torch.ones(1, 4)).sum().backward()
    return {"model": model, "optimizer": stepped(torch.optim.AdamW(model.parameters()))}


def test_a_local_tensor_exchanged_in_a_dtensor_is_noticed() -> None:
    def change(state: State) -> Any:
        before = state["x"]._local_tensor
        state["x"]._local_tensor = before.clone()
        return before

    assert walks_after(change, {"x": placed(torch.ones(4, 2))}) == 1


def test_data_set_in_the_local_tensor_is_noticed() -> None:
    def change(state: State) -> None:
        state["x"]._local_tensor.data = torch.zeros(4, 2)

    assert walks_after(change, {"x": placed(torch.ones(4, 2))}) == 1


def test_other_placements_of_a_dtensor_are_noticed() -> None:
    def change(state: State) -> None:
        x = state["x"]
        x._spec = x.redistribute(placements=[Replicate()])._spec

    assert walks_after(change, {"x": placed(torch.ones(4, 2))}) == 1


def test_a_training_step_under_fsdp_changes_no_structure() -> None:
    def change(state: State) -> None:
        state["model"](torch.ones(1, 4)).sum().backward()
        state["optimizer"].step()
        state["optimizer"].zero_grad()

    assert walks_after(change, sharded_state()) == 0


def test_a_gathered_model_is_walked_to_each_time_until_it_is_sharded_again() -> None:
    state = sharded_state()
    live = Counted(state, rank=0, world=1)
    before = live.flatten()
    with torch.no_grad():
        state["model"](torch.ones(1, 4))
    assert not isinstance(state["model"][0].weight, DTensor)
    for walks in (2, 3):
        gathered = live.flatten()
        assert (live.walks, gathered.tensors is before.tensors) == (walks, True)
        assert_same(gathered, LiveState(state, rank=0, world=1).flatten())
    state["model"].reshard()
    for _ in range(2):
        assert_same(live.flatten(), LiveState(state, rank=0, world=1).flatten())
    assert live.walks == 4


def test_sharding_a_model_is_noticed() -> None:
    assert walks_after(
        lambda state: fully_shard(state["model"], mesh=init_device_mesh("cpu", (1,))), {"model": nn.Linear(2, 2)}
    )


def test_wrapping_a_model_in_ddp_is_noticed_and_then_kept() -> None:
    state: State = {"model": nn.BatchNorm1d(2)}
    live = Counted(state, rank=0, world=1)
    assert {leaf.cut.proof for leaf in live.flatten().tensors} == {Proof.CLAIM}
    state["model"] = DistributedDataParallel(state["model"])
    for _ in range(2):
        flat = live.flatten()
        assert_same(flat, LiveState(state, rank=0, world=1).flatten())
        assert {leaf.cut.proof for leaf in flat.tensors} == {Proof.MESH, Proof.FIRST}
    assert live.walks == 2


def test_what_ddp_ignores_is_looked_at() -> None:
    def change(state: State) -> None:
        state["model"].parameters_to_ignore.add("weight")

    assert walks_after(change, {"model": DistributedDataParallel(nn.Linear(2, 2))}) == 1


def test_a_compiled_model_is_not_walked_to_again() -> None:
    assert walks_after(lambda state: None, {"model": torch.compile(nn.Sequential(nn.Linear(2, 2)))}) == 0
