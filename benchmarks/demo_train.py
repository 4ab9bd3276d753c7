"""Train a byte-level GPT on the sources of Python's standard library, saving while it trains.

    torchrun --nproc-per-node 4 -m benchmarks.demo_train RUN --steps 100 --save-every 10 --tp 2

FSDP2 over TP on as many ranks as there are. Stop it in any way, and start it again on any number of ranks.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.corpus import Windows, library_sources
from benchmarks.gpt import GPT, Shape, cut_by_columns_and_rows, shard_fully
from benchmarks.journal import Journal
from benchmarks.launch import leave_group
from dscheck import Checkpointer
from dscheck.storage.base import Storage

# 522 rows are 261 a rank under TP over 2, which FSDP over 2 cuts into 131 and 130.
SHAPE = Shape(vocabulary=256, length=128, width=156, heads=6, hidden=522, layers=4)
BATCH = 8
SEED = 7


def build(ranks: int, tp: int) -> tuple[GPT, slice, dist.ProcessGroup | None]:
    """The model, cut over all ranks; this rank's part of each batch; and the group that shares a batch out."""
    torch.manual_seed(SEED)
    model = GPT(SHAPE)
    if ranks == 1:
        return model, slice(0, BATCH), None
    mesh = init_device_mesh("cpu", (ranks // tp, tp), mesh_dim_names=("fsdp", "tp"))
    if tp > 1:
        cut_by_columns_and_rows(model, mesh["tp"])
    if ranks > tp:
        shard_fully(model, mesh["fsdp"])
    count = BATCH * tp // ranks
    first = mesh["fsdp"].get_local_rank() * count
    return model, slice(first, first + count), mesh["fsdp"].get_group()


def mean_over(group: dist.ProcessGroup | None, loss: torch.Tensor) -> float:
    """The loss of the whole batch, from those of the equal parts that the ranks of `group` have; summed in float64."""
    total = loss.detach().double()
    if group is None:
        return total.item()
    dist.all_reduce(total, group=group)
    return total.item() / dist.get_world_size(group)


def train(root: str | Storage, *, steps: int, save_every: int, tp: int, journal: Journal) -> None:
    """Train up to step `steps`, from the newest step in `root` if there is one."""
    model, mine, group = build(dist.get_world_size() if dist.is_initialized() else 1, tp)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    loader = Windows(library_sources(), SHAPE.length, SEED)

    def train_step() -> torch.Tensor:
        tokens, targets = loader.draw(BATCH)
        loss = model(tokens[mine], targets[mine])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        return loss

    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
    with Checkpointer(root, state) as ckpt:
        done = ckpt.load()
        journal.loaded(ckpt.loaded)
        for step in range((done or 0) + 1, steps + 1):
            began = time.perf_counter()
            loss = mean_over(group, train_step())
            if save_every and step % save_every == 0:
                journal.follow(ckpt.save(step))
            journal.stepped(step, loss, time.perf_counter() - began)
    journal.collect()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a byte-level GPT, saving while it trains.")
    parser.add_argument("root", help="where the checkpoints lie")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save-every", type=int, default=10, help="0: never")
    parser.add_argument("--tp", type=int, default=1, help="ranks that share each layer")
    parser.add_argument(
        "--journal", type=Path, help="folder for losses and times, a file a rank; else they are printed"
    )
    return parser.parse_args()


def main(storage_of: Callable[[str], str | Storage] = str) -> None:
    given = arguments()
    torch.use_deterministic_algorithms(True)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    journal = Journal(given.journal and given.journal / f"rank-{os.environ.get('RANK', '0')}.jsonl")
    train(storage_of(given.root), steps=given.steps, save_every=given.save_every, tp=given.tp, journal=journal)
    if dist.is_initialized():
        leave_group()


if __name__ == "__main__":
    main()
