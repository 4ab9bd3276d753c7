"""Who holds what under DistributedDataParallel, and optimizers that split their state over its ranks (TRAP 5)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from dscheck.state import FlatState, LiveState, Proof
from tests.state.fake_ranks import on_each
from tests.state.roundtrip import load, save


def test_holders_under_ddp_are_the_ranks_of_its_group_and_its_first_decides_buffers() -> None:
    def run(rank: int) -> dict[str, tuple[Proof, tuple[int, ...]]]:
        group = dist.new_group([1, 2])
        if rank == 0:
            return {}
        model = DistributedDataParallel(nn.BatchNorm1d(3), process_group=group)
        optimizer = torch.optim.AdamW(model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        flat = LiveState({"model": model, "optimizer": optimizer}, rank=rank, world=3).flatten()
        return {leaf.name: (leaf.cut.proof, leaf.cut.holders) for leaf in flat.tensors}

    for found in on_each(3, run)[1:]:
        assert found["model.weight"] == (Proof.MESH, (1, 2))
        assert found["optimizer.state.exp_avg.model.weight"] == (Proof.MESH, (1, 2))
        assert found["optimizer.state.step.model.weight"] == (Proof.MESH, (1, 2))
        assert found["model.running_mean"] == (Proof.FIRST, (1,))
        assert found["model.num_batches_tracked"] == (Proof.FIRST, (1,))


def test_a_zero_redundancy_optimizer_is_saved_in_parts_and_loaded_into_other_parts() -> None:
    def make(step: bool) -> dict[str, Any]:
        torch.manual_seed(0)
        model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)))
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.5 if step else 0.1)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 2.0)
        if step:
            optimizer.optim.step()
        return {"model": model, "optimizer": optimizer}

    def saved_on(rank: int) -> tuple[FlatState, set[str]]:
        flat = LiveState(make(True), rank=rank, world=2, rng=False).flatten()
        names = {leaf.name for leaf in flat.tensors}
        flat.tensors = [replace(leaf, owned_by=None, cut=replace(leaf.cut, holders=(rank,))) for leaf in flat.tensors]
        return flat, names

    flats = on_each(2, saved_on)
    assert flats[0][1] != flats[1][1]
    checkpoint = save([flat for flat, _ in flats])
    moments = {name for name in checkpoint.tensors if name.startswith("optimizer.state.exp_avg.")}
    assert len(moments) == 6

    def loaded_on(rank: int) -> list[Any]:
        state = make(False)
        load(checkpoint, state, rank=rank, world=3, rng=False)
        inner = state["optimizer"].optim
        assert all(group["lr"] == 0.5 for group in inner.param_groups)
        return [inner.state[p]["exp_avg"].unique().tolist() for group in inner.param_groups for p in group["params"]]

    loaded = on_each(3, loaded_on)
    assert sum(map(len, loaded)) == 6
    assert all(torch.allclose(torch.tensor(values), torch.tensor([0.2])) for part in loaded for values in part)
