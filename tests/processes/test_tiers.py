"""Two tiers with real ranks: a disk of each node's own, kills, lost nodes, and training that goes on."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dscheck import Checkpointer, Tier
from dscheck.commit import read_history
from dscheck.commit.contents import Contents
from dscheck.commit.verify import verify
from dscheck.storage import LocalStorage, Storage
from dscheck.testing.faults import Faulty, amid
from tests.processes.pool import Job

RANKS, NODES = 4, 2


def roots(folder: str, rank: int, shared: Storage | None = None) -> list[Any]:
    """Two ranks a node."""
    node = rank * NODES // RANKS
    return [Tier(f"{folder}/node-{node}", node_local=True), shared or f"{folder}/shared"]


def train(rank: int, folder: str, steps: int, kill_in_upload_of: int | None = None) -> tuple[int | None, str, float]:
    """Train on from what is there, each step a save; the step loaded, from where, and what the weights then are."""
    warnings.simplefilter("ignore")
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 30))
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    shared: Storage | None = None
    if kill_in_upload_of is not None and rank == 3:
        die = amid(lambda operation: os.kill(os.getpid(), signal.SIGKILL), f"steps/{kill_in_upload_of}/*")
        shared = Faulty(LocalStorage(f"{folder}/shared"), die)
    with Checkpointer(
        roots(folder, rank, shared), {"model": model, "optimizer": optimizer}, timeout_s=20.0, upload_timeout_s=20.0
    ) as ckpt:
        found = ckpt.load()
        root = "" if ckpt.loaded is None else ckpt.loaded.root
        total = sum(float(parameter.full_tensor().detach().sum()) for parameter in model.parameters())
        for step in range((found or 0) + 1, steps + 1):
            model(torch.full((2, 40), float(step))).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            ckpt.save(step).wait()
        return found, root, total


def whole(folder: Path) -> list[int]:
    """The steps of the shared tier, none damaged."""
    storage = LocalStorage(folder / "shared")
    history = read_history(storage)
    for ref in history.visible:
        assert not [*verify(Contents.open(storage, history.record(ref)), lambda nbytes: None)]
    return [ref.step for ref in history.visible]


def test_a_rank_killed_in_its_upload_and_a_lost_node(tmp_path: Path) -> None:
    """commit P36, P37: the restart ends the upload; a node that is lost takes the step from the shared tier."""
    folder = tmp_path / "roots"
    ended = Job(tmp_path / "first", RANKS, train, str(folder), 3, 3).join()
    assert ended[3].signal == signal.SIGKILL
    assert whole(folder) == [1, 2]
    again = Job(tmp_path / "second", RANKS, train, str(folder), 4).results()
    assert [(found, Path(root).name) for found, root, _ in again] == [
        (3, f"node-{rank * NODES // RANKS}") for rank in range(RANKS)
    ]
    assert whole(folder) == [1, 2, 3, 4]
    (folder / "node-1").rename(folder / "lost")
    third = Job(tmp_path / "third", RANKS, train, str(folder), 5).results()
    assert {(found, Path(root).name) for found, root, _ in third} == {(4, "shared")}
    fourth = Job(tmp_path / "fourth", RANKS, train, str(folder), 5).results()
    assert {Path(root).name for _, root, _ in fourth} == {"node-0", "node-1"}
    assert len({total for _, _, total in fourth}) == 1
