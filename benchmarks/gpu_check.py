"""Saves under training on one accelerator: are they bit for bit the moment of `save()`, and what do they cost?

    python -m benchmarks.gpu_check --out result.json

Exits with 1 when any byte of any committed step differs from a clone that was taken at its `save()`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.corpus import Windows, library_sources
from benchmarks.gpt import GPT, Shape
from benchmarks.machine import describe, versions
from dscheck import Checkpointer, SaveHandle


class Job:
    """A GPT in training on one device: weights in fp32, forward and backward in bf16, fused AdamW."""

    def __init__(self, shape: Shape, batch: int, device: torch.device, seed: int) -> None:
        torch.manual_seed(seed)
        self.device, self.batch = device, batch
        self.model = GPT(shape).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, fused=True)
        self.scheduler = torch.optim.lr_scheduler.LinearLR(self.optimizer, total_iters=100)
        self.loader = Windows(library_sources(), shape.length, seed)
        self.steps = 0

    def state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("model", "optimizer", "scheduler", "loader")}

    def train_step(self) -> None:
        tokens, targets = (part.to(self.device, non_blocking=True) for part in self.loader.draw(self.batch))
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.model(tokens, targets)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.steps += 1

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor by name: weights, buffers and what the optimizer keeps for each weight."""
        yield from self.model.state_dict(keep_vars=True).items()
        for name, weight in self.model.named_parameters():
            for key, value in self.optimizer.state[weight].items():
                yield f"{name}.{key}", value

    def nbytes(self) -> int:
        """Of the tensors, tied ones once."""
        return sum(tensor.nbytes for tensor in {tensor.data_ptr(): tensor for _, tensor in self.tensors()}.values())


@dataclass(frozen=True, slots=True)
class Moment:
    """The state at one `save()`, on the device, and the plain objects beside it."""

    tensors: dict[str, torch.Tensor]
    scheduler: dict[str, Any]
    loader: dict[str, Any]

    @classmethod
    def of(cls, job: Job) -> Moment:
        """All that was enqueued before is in it, and it is whole when this returns."""
        tensors = {name: tensor.detach().clone() for name, tensor in job.tensors()}
        synchronize(job.device)
        return cls(tensors, job.scheduler.state_dict(), job.loader.state_dict())

    def differences(self, job: Job) -> list[str]:
        """What is not the same in `job`, bit for bit."""
        there = dict(job.tensors())
        names = sorted({name for name in self.tensors if name not in there} | there.keys() - self.tensors.keys())
        names += [name for name, tensor in self.tensors.items() if name in there and not same(tensor, there[name])]
        objects = {"scheduler": job.scheduler.state_dict() == self.scheduler, "loader": self._same_loader(job)}
        return names + [name for name, equal in objects.items() if not equal]

    def _same_loader(self, job: Job) -> bool:
        now = job.loader.state_dict()
        return now["drawn"] == self.loader["drawn"] and torch.equal(now["generator"], self.loader["generator"])


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both have one dtype and shape and the same bits, NaN and signs of zeros included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    other = other.detach().to(one.device)
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def run_plain(job: Job, steps: int) -> float:
    """Seconds for that many steps without a save."""
    synchronize(job.device)
    began = time.perf_counter()
    for _ in range(steps):
        job.train_step()
    synchronize(job.device)
    return time.perf_counter() - began


def run_saving(job: Job, ckpt: Checkpointer, steps: int, every: int) -> tuple[float, list[SaveHandle]]:
    """Seconds for that many steps with a save after each `every`, and the saves, all of which have ended."""
    handles = []
    synchronize(job.device)
    began = time.perf_counter()
    for index in range(1, steps + 1):
        job.train_step()
        if index % every == 0 and index < steps:
            handles.append(ckpt.save(job.steps))
    synchronize(job.device)
    seconds = time.perf_counter() - began
    for handle in handles:
        handle.wait()
    return seconds, handles


def run_checked(job: Job, ckpt: Checkpointer, saves: int, every: int) -> dict[int, Moment]:
    """That many saves under training, and the moment of each."""
    moments = {}
    for _ in range(saves):
        moments[job.steps] = Moment.of(job)
        handle = ckpt.save(job.steps)
        for _ in range(every):
            job.train_step()
        handle.wait()
    return moments


def compare(root: Path, moments: dict[int, Moment], other: Job) -> dict[int, list[str]]:
    """What differs, by step, once each was loaded into `other`, which was never trained."""
    differences = {}
    with Checkpointer(root, other.state()) as ckpt:
        for step, moment in moments.items():
            ckpt.load(step)
            differences[step] = moment.differences(other)
    return differences


def check(given: argparse.Namespace, root: Path) -> dict[str, Any]:
    """All of it: times first, then the comparison."""
    device = torch.device(given.device)
    shape = Shape(256, given.length, given.width, given.heads, 4 * given.width, given.layers)
    job = Job(shape, given.batch, device, seed=1)
    run_plain(job, 5)
    with Checkpointer(root, job.state()) as ckpt:
        run_saving(job, ckpt, 2 * given.every, given.every)  # the first save allocates what the later ones reuse
        before = run_plain(job, given.steps)
        saving, handles = run_saving(job, ckpt, given.steps, given.every)
        after = run_plain(job, given.steps)
        moments = run_checked(job, ckpt, given.checked, given.every)
    differences = compare(root, moments, Job(shape, given.batch, device, seed=2))
    plain_ms, saving_ms = (1e3 * seconds / given.steps for seconds in ((before + after) / 2, saving))
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "machine": describe(root),
        "versions": versions("dscheck", "torch"),
        "parameters": sum(weight.numel() for weight in job.model.parameters()),
        "state_bytes": job.nbytes(),
        "step_ms": {"plain_before": 1e3 * before / given.steps, "plain_after": 1e3 * after / given.steps},
        "step_ms_saving": saving_ms,
        "extra_ms_per_save": (saving_ms - plain_ms) * given.steps / len(handles),
        "saves": [{"step": handle.step, **asdict(handle.stats)} for handle in handles],
        "call_ms": 1e3 * statistics.median(handle.stats.stall_s["call"] for handle in handles),
        "fence_ms": 1e3 * statistics.median(handle.stats.stall_s["fence"] for handle in handles),
        "checked_steps": list(differences),
        "differences": {step: names for step, names in differences.items() if names},
    }


def report(result: dict[str, Any]) -> str:
    plain = statistics.mean(result["step_ms"].values())
    size = f"{result['parameters'] / 1e6:.1f} M parameters, {result['state_bytes'] / 1e9:.2f} GB of state"
    return (
        f"{result['device']}: {size}\n"
        f"step: {plain:.1f} ms without saves, {result['step_ms_saving']:.1f} ms with\n"
        f"a save: call {result['call_ms']:.2f} ms, fence {result['fence_ms']:.2f} ms (on the CPU), "
        f"{result['extra_ms_per_save']:.1f} ms more loop time, {result['extra_ms_per_save'] / plain:.3f} steps\n"
        f"{len(result['checked_steps'])} steps loaded and compared with clones: "
        + (f"DIFFERENT: {result['differences']}" if result["differences"] else "equal bit for bit")
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    for name, default in {"width": 768, "heads": 12, "layers": 14, "length": 512, "batch": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--steps", type=int, default=60, help="steps of each timed run")
    parser.add_argument("--every", type=int, default=10, help="steps from save to save")
    parser.add_argument("--checked", type=int, default=5, help="saves that are compared with clones")
    parser.add_argument(
        "--dir", type=Path, default=Path(tempfile.gettempdir()), help="where the checkpoints go, for a while"
    )
    parser.add_argument("--out", type=Path, required=True, help="file for the result, as JSON")
    given = parser.parse_args()
    if given.steps <= given.every:
        parser.error(f"--steps {given.steps} has no room for a save every {given.every} steps and a step after it")
    with tempfile.TemporaryDirectory(prefix="gpu-check-", dir=given.dir) as root:
        result = check(given, Path(root))
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(report(result))
    return 1 if result["differences"] else 0


if __name__ == "__main__":
    sys.exit(main())
