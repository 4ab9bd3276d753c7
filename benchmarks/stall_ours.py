"""A dscheck save every 10 steps: what it costs with spare device memory and without, and what memory it takes."""

from __future__ import annotations

import shutil
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.stall_bench import TIMEOUT_S, Bench
from benchmarks.stall_cost import measure
from benchmarks.stall_job import Training
from benchmarks.stall_memory import HostPeak, device_used
from benchmarks.stall_methods import Dscheck

GIB = 1 << 30
# The host memory is touched and registered in the background meanwhile, which takes 6 s for 15.7 GB.
STEPS_AHEAD = 80
TOUCH_BYTES = 64 << 20


def every_ten_steps(bench: Bench) -> None:
    job = bench.training()
    budget = 1 << 20 if bench.options.tiny else 4 * GIB
    variants: dict[str, tuple[int | str, int]] = {
        "dscheck": ("auto", bench.options.windows),
        "dscheck, no device memory": (0, bench.options.windows),
        f"dscheck, {budget / GIB:g} GiB of device memory": (budget, 1),
    }
    with bench.folder("touch") as folder:
        _touch(Path(folder) / "file", job.nbytes())
    for name, (device_memory, windows) in variants.items():
        bench.attempt(name, partial(_variant, bench, job, name, device_memory, windows))


def _touch(path: Path, nbytes: int) -> None:
    """Let the target's memory be handed out once: a first save into fresh memory would pay for that alone."""
    zeros = bytes(TOUCH_BYTES)
    with path.open("wb") as file:
        for _ in range(0, nbytes, TOUCH_BYTES):
            file.write(zeros)


def _variant(bench: Bench, job: Training, name: str, device_memory: int | str, windows: int) -> dict[str, Any]:
    settings: dict[str, Any] = {"device_memory_bytes": device_memory, "timeout_s": TIMEOUT_S}
    if bench.options.trace:
        settings["trace"] = bench.options.work + "/traces"
        Path(settings["trace"]).mkdir(exist_ok=True)
    steps = bench.options.steps
    job.run(2)
    host, before = HostPeak(), device_used(bench.device)
    with bench.folder("ours") as folder:
        method = Dscheck(job, folder, **settings)
        try:
            ahead = [job.run(1) for _ in range(2 if bench.options.tiny else STEPS_AHEAD)]
            result = measure(job, method, windows, steps)
            device_peak = None
            try:
                device_peak = _watched(job, method, steps, bench.device) - before
            except Exception as error:
                result.setdefault("failed", f"the save that was watched: {type(error).__name__}: {error}")
        finally:
            method.close()
            _keep_trace(bench, name)
    return result | {
        "first_ms": result["extra_ms"][0],
        "ahead_step_ms": 1e3 * statistics.median(ahead),
        "saves": [_told(handle) for handle in method.handles],
        "host_peak_bytes": host.grown(),
        "device_peak_bytes": device_peak if before else None,
        "device_budget": device_memory,
    }


def _watched(job: Training, method: Dscheck, steps: int, device: torch.device) -> int:
    """The most device memory in use outside torch's allocator round one more save, which is not timed."""
    step = job.steps
    method.save(step)
    most = device_used(device)
    for _ in range(steps):
        job.train_step()
        most = max(most, device_used(device))
    method.wait()
    method.remove(step)
    return most


def _told(handle: Any) -> dict[str, Any]:
    stats = handle.stats
    return {
        "bytes": stats.bytes,
        "captured_s": stats.captured_s,
        "written_s": stats.written_s,
        "committed_s": stats.committed_s,
        "stall_ms": {cause: 1e3 * seconds for cause, seconds in stats.stall_s.items()},
    }


def _keep_trace(bench: Bench, name: str) -> None:
    """Of all the traces of a variant, the last but one: the last save is the one that was watched."""
    if not bench.options.trace:
        return
    written, target = Path(bench.options.work) / "traces", Path(bench.options.trace)
    found = sorted(written.iterdir(), key=lambda path: path.stat().st_mtime)
    if found:
        target.mkdir(parents=True, exist_ok=True)
        words = "-".join(name.replace(",", "").replace(".", "").split())
        shutil.copyfile(found[max(0, len(found) - 2)], target / f"stall-{words}.trace.json")
    shutil.rmtree(written)
