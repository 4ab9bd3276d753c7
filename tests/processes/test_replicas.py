"""Replicated weights are written once, and the writing is spread evenly over the ranks that hold them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dscheck import Checkpointer
from dscheck.layout.cover import prove_cover
from tests.processes.pool import Job
from tests.processes.roots import newest

# Rows that cannot be dealt out evenly, a plain matrix, a vector, and many tensors below 1 MiB.
LARGE = {"wide": (7, 150_001), "square": (1030, 1031), "flat": (600_001,)}
SMALL = {f"small{number}": (50 + number, 64) for number in range(20)}
RANKS = 4


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, shape in (LARGE | SMALL).items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


def save(rank: int, layout: str, root: str) -> None:
    model: nn.Module = Weights()
    if layout == "ddp":
        model = DistributedDataParallel(model)
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    with Checkpointer(root, {"model": model}, timeout_s=60.0) as ckpt:
        ckpt.save(1).wait()


@pytest.mark.parametrize(("layout", "copies"), [("ddp", 4), ("hsdp", 2)])
def test_replicas_are_written_once_and_evenly(layout: str, copies: int, tmp_path: Path) -> None:
    Job(tmp_path / "save", RANKS, save, layout, str(tmp_path / "root")).results()
    contents = newest(tmp_path / "root")
    plan, written, small = contents.plan, Counter[int](), Counter[int]()
    for number, row in enumerate(plan.tensors):
        fragments = plan.fragments_of(number)
        prove_cover(row.name, row.shape, [fragment.region for fragment in fragments])
        assert {len(plan.holders[fragment.holders]) for fragment in fragments} == {copies}
        for fragment in fragments:
            assert fragment.writer in plan.holders[fragment.holders]
            (written if row.name.removeprefix("model.") in LARGE else small)[fragment.writer] += fragment.nbytes
    assert len(written) == RANKS
    assert max(written.values()) <= 1.1 * sum(written.values()) / RANKS
    assert len(small) == RANKS
    for rank, file in enumerate(contents.files):
        assert file.size < written[rank] + small[rank] + 100_000
