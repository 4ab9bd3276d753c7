"""Many saves at random distances under training, each verified and compared with a hash of its moment."""

from __future__ import annotations

import os
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.stall_bench import TIMEOUT_S, Bench
from benchmarks.stall_job import Training
from dscheck import Checkpointer, SaveHandle
from dscheck.commit import read_history
from dscheck.commit.contents import Contents
from dscheck.commit.verify import verify
from dscheck.storage import open_storage

# Saves whose data lie there together, before they are checked and removed.
TOGETHER = 5
FARTHEST = 5
BATCH = 4
CHUNK_WORDS = 4 << 20
# Odd, so that no power of two of a difference is lost: the golden ratio's 64 bits, as a signed number.
FACTOR = -7046029254386353131
SMALLEST_RING = 1 << 20


def soak(bench: Bench) -> None:
    """`saves` in all, over four ways to have little memory."""
    job, other = (Training(bench.smaller, BATCH, bench.device, seed) for seed in (1, 2))
    job.run(2)
    ring = max(SMALLEST_RING, job.nbytes() // 4)
    variants: dict[str, dict[str, Any]] = {
        "spill": {},
        "no spill": {"device_memory_bytes": 0},
        "ring": {"host_memory_bytes": ring},
        "ring, no spill": {"host_memory_bytes": ring, "device_memory_bytes": 0},
    }
    for number, (name, settings) in enumerate(variants.items()):
        saves = len(range(number, bench.options.saves, len(variants)))
        bench.attempt(name, partial(_variant, bench, job, other, saves, settings))


def _variant(bench: Bench, job: Training, other: Training, saves: int, settings: dict[str, Any]) -> dict[str, Any]:
    distances = random.Random(saves)
    result: dict[str, Any] = {"saves": saves, "committed": 0, "damaged": [], "different": {}, "errors": []}
    with bench.folder("soak") as folder, Checkpointer(folder, job.state(), timeout_s=TIMEOUT_S, **settings) as ckpt:
        while saves > 0:
            moments: list[tuple[SaveHandle, torch.Tensor]] = []
            for _ in range(min(saves, TOGETHER)):
                hashes = fingerprint(job)
                moments.append((ckpt.save(job.steps), hashes))
                for _ in range(distances.randint(1, FARTHEST)):
                    job.train_step()
            saves -= len(moments)
            _check(folder, other, moments, result)
    return result | {"state_bytes": job.nbytes(), "settings": settings}


def _check(
    folder: Path, other: Training, moments: list[tuple[SaveHandle, torch.Tensor]], result: dict[str, Any]
) -> None:
    """Add to `result` what became of these saves, and remove what they wrote."""
    committed = {}
    for handle, hashes in moments:
        try:
            handle.wait()
            committed[handle.step] = hashes
        except Exception as error:
            result["errors"].append(f"step {handle.step}: {type(error).__name__}: {error}"[:300])
    result["committed"] += len(committed)
    with ThreadPoolExecutor(TOGETHER) as threads:
        for step, damage in zip(committed, threads.map(partial(_damage, folder), committed), strict=True):
            result["damaged"] += [f"step {step}: {what}" for what in damage]
    with Checkpointer(folder, other.state(), read_threads=len(os.sched_getaffinity(0))) as reader:
        for step, hashes in committed.items():
            reader.load(step)
            different = [
                name
                for name, equal in zip(names(other), (fingerprint(other) == hashes).tolist(), strict=True)
                if not equal
            ]
            if different:
                result["different"][step] = different[:5]
            shutil.rmtree(folder / "steps" / str(step))


def _damage(folder: Path, step: int) -> list[str]:
    storage = open_storage(folder)
    record = read_history(storage).resolve(step)
    if record is None:
        return ["the step is not there"]
    return [f"{found.key}: {found.what}" for found in verify(Contents.open(storage, record), lambda nbytes: None)]


def names(job: Training) -> list[str]:
    return sorted(name for name, _ in job.tensors())


def fingerprint(job: Training) -> torch.Tensor:
    """One hash a tensor, in the order of `names`: of the moment that the stream has got to, and not waited for."""
    tensors = dict(job.tensors())
    return torch.stack([digest(tensors[name]) for name in sorted(tensors)])


def digest(tensor: torch.Tensor) -> torch.Tensor:
    """64 bits of all of `tensor`'s bits and their order, computed where it lies.

    A sum of 32-bit words, each times an odd number of its place: no change of one word goes unseen.
    """
    data = tensor.detach().reshape(-1).view(torch.uint8)
    if missing := -data.numel() % 4:
        data = torch.cat([data, data.new_zeros(missing)])
    words = data.view(torch.int32)
    places = torch.arange(min(CHUNK_WORDS, words.numel()), device=words.device, dtype=torch.int64)
    factors = (places * FACTOR) | 1
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for chunk in words.split(CHUNK_WORDS):
        total = total * FACTOR + (chunk.to(torch.int64) * factors[: chunk.numel()]).sum()
    return total
