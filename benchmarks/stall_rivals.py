"""What the machine gives, two prototypes that reach it, and what the others make of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.prototypes import SideStream, copy_rate, device_copy_rate, spill_bytes
from benchmarks.stall_bench import Bench
from benchmarks.stall_cost import Method
from benchmarks.stall_job import Training, phases
from benchmarks.stall_methods import Background, DcpSave, DcpStaged, TorchCheckpointing, TorchSave

# Their saves take up to 25 s each: as few as show the difference. DefaultStager's second one is the one that fails.
RIVALS: dict[str, tuple[Callable[[Training, Path], Method], int]] = {
    "torch.save": (TorchSave, 1),
    "DCP save": (DcpSave, 1),
    "DCP async_save": (Background, 1),
    "DCP async_save, DefaultStager": (DcpStaged, 2),
    "torch_checkpointing": (TorchCheckpointing, 2),
}


def rivals(bench: Bench) -> None:
    job = bench.training()
    for name, (make, windows) in RIVALS.items():
        bench.attempt(name, partial(_rival, bench, job, make, windows))


def _rival(bench: Bench, job: Training, make: Callable[[Training, Path], Method], windows: int) -> dict[str, Any]:
    with bench.folder("rival") as folder:
        return bench.cost(job, make(job, folder), windows)


def limits(bench: Bench) -> None:
    job = bench.training()
    facts = {
        "batch": job.batch,
        "length": bench.shape.length,
        "parameters": sum(weight.numel() for weight in job.model.parameters()),
        "tensors": len(list(job.tensors())),
        "state_bytes": job.nbytes(),
        **phases(job.marked(bench.options.steps)),
    }
    bench.row("training", **facts)
    rates = bench.attempt("machine", lambda: _rates(bench))
    bench.attempt("limit A", partial(_prototype, bench, job, 0))
    if rates is not None:
        window_s = facts["forward_backward_ms"] / 1e3
        spilled = spill_bytes(job.nbytes(), 1e9 * rates["host_gb_s"], window_s)
        bench.attempt("limit B", partial(_prototype, bench, job, spilled))


def _prototype(bench: Bench, job: Training, spilled: int) -> dict[str, Any]:
    if bench.device.type != "cuda":
        raise RuntimeError("needs a CUDA device")
    return bench.cost(job, SideStream(job, spilled)) | {"spilled_bytes": spilled}


def _rates(bench: Bench) -> dict[str, Any]:
    return {
        "host_gb_s": copy_rate(bench.device, bench.copy_bytes) / 1e9,
        "device_gb_s": device_copy_rate(bench.device, bench.copy_bytes) / 1e9,
    }
