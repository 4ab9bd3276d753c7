"""One rank of the part of benchmarks.stall that has several GPUs: all-reduces while a save is captured, and without.

python -m torch.distributed.run --standalone --nproc-per-node=2 -m benchmarks.stall_ranks FOLDER cuda|cpu BYTES
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from benchmarks.launch import leave_group
from benchmarks.sink import SinkStorage
from benchmarks.stall_bench import TIMEOUT_S
from benchmarks.stall_job import Timeline
from benchmarks.stall_often import Span
from dscheck import Checkpointer

REDUCED_BYTES = 256 << 20
OPERATIONS = 200
WEIGHT_BYTES = 64 << 20
SAVES = 6


class Sharded:
    """Weights cut over all ranks, AdamW on them, and all-reduces in the place of forward and backward."""

    def __init__(self, device: torch.device, nbytes: int, *, tiny: bool) -> None:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        each = 1 << 20 if tiny else WEIGHT_BYTES
        self.device = device
        self.operations = 64 if tiny else OPERATIONS
        self.reduced = torch.ones((1 << 12 if tiny else REDUCED_BYTES) // 4, device=device)
        self.module = nn.Module()
        for number in range(max(1, nbytes // (3 * each))):
            local = torch.randn(each // 4, device=device)
            weight = nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)], run_check=False))
            weight.grad = torch.zeros_like(weight, requires_grad=False)
            self.module.register_parameter(f"weight{number}", weight)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.0)
        self.steps = 0

    def state(self) -> dict[str, Any]:
        return {"model": self.module, "optimizer": self.optimizer}

    def train_step(self, timeline: Timeline | None = None) -> None:
        """All-reduces, each marked by the end of the one before and its own, then the optimizer's step."""
        if timeline is not None:
            timeline.mark()
        for _ in range(self.operations):
            dist.all_reduce(self.reduced, op=dist.ReduceOp.MAX)
            if timeline is not None:
                timeline.mark()
        self.optimizer.step()
        self.steps += 1

    def spans(self, moments: list[float]) -> list[Span]:
        """The all-reduces of some steps' marks."""
        found = []
        for start in range(0, len(moments), self.operations + 1):
            found += [Span(*pair) for pair in itertools.pairwise(moments[start : start + self.operations + 1])]
        return found


def measure(job: Sharded, folder: Path) -> dict[str, float]:
    """All-reduces a second during captures as a part of those without, in this rank's eyes."""
    with Checkpointer(SinkStorage(folder), job.state(), timeout_s=TIMEOUT_S) as ckpt:
        until = time.monotonic() + (0.5 if job.operations < OPERATIONS else 8.0)
        steps = 0
        while steps < 3 or not _agreed(job.device, time.monotonic() > until):
            job.train_step()
            steps += 1
        for _ in range(2):
            ckpt.save(job.steps).wait()
            job.train_step()
        plain = _plain(job)
        during: list[Span] = []
        for _ in range(SAVES):
            timeline = Timeline(job.device)
            handle = ckpt.save(job.steps)
            for _ in range(3):
                job.train_step(timeline)
            spans = job.spans(timeline.moments())
            handle.wait()
            capture = Span(handle.began, handle.began + (handle.stats.captured_s or 0.0))
            during += [span for span in spans if span.meets(capture)]
        plain += _plain(job)
    if not during:
        raise RuntimeError("the captures were over before an all-reduce began: give the ranks more bytes")
    without, within = (statistics.median(span.ended - span.began for span in spans) for spans in (plain, during))
    factor = 2 * (dist.get_world_size() - 1) / dist.get_world_size()
    return {
        "ratio": without / within,
        "bus_gb_s": job.reduced.nbytes * factor / without / 1e9,
        "operations_during": float(len(during)),
        "capture_s": handle.stats.captured_s or 0.0,
        "capture_bytes": float(handle.stats.bytes),
    }


def _plain(job: Sharded) -> list[Span]:
    timeline = Timeline(job.device)
    for _ in range(3):
        job.train_step(timeline)
    return job.spans(timeline.moments())


def _agreed(device: torch.device, mine: bool) -> bool:
    """Whether all ranks say so: they leave a loop together."""
    votes = torch.tensor(int(mine), device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MIN)
    return bool(votes.item())


def main(folder: str, kind: str, nbytes: int) -> None:
    device = torch.device(kind)
    if kind == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    measured = measure(Sharded(device, nbytes, tiny=kind == "cpu"), Path(folder) / "sink")
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, measured)
    if dist.get_rank() == 0:
        worst = min(everyone, key=lambda one: float(one["ratio"]))
        (Path(folder) / "ranks.json").write_text(json.dumps({"ranks": len(everyone), **worst}))
    leave_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
