"""One rank of a part of benchmarks.versus: every load is checked bit for bit.

python -m benchmarks.versus_rank SPEC, a Spec as JSON, under torchrun. The first rank writes Spec.out.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.contenders import Contender, RawDisk
from benchmarks.launch import leave_group
from benchmarks.raw_disk import ONE_BLOCK, WAYS, evict, seconds_of, warm_page_cache
from benchmarks.rivals import ALL
from benchmarks.sharded_state import Layout, Live, gpt_shapes, live
from benchmarks.versus_replicas import replicas
from dscheck.probe import Way

Part = Literal["sweep", "compare", "fewer", "more", "replicas"]
OURS = "dscheck"
LAYOUTS: tuple[Layout, ...] = ("rows", "columns", "stages")
SWEEP_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Spec:
    """What a job of ranks is to do. `folder`: on the disk to measure; `write`, `read`: how the raw disk is gone at."""

    part: Part
    folder: str
    out: str
    nbytes: int
    rounds: int
    device: str = "cpu"
    drop_caches: bool = True
    contender: str = OURS
    write: tuple[bool, int, int] = ONE_BLOCK
    read: tuple[bool, int, int] = ONE_BLOCK


class WrongBytesError(Exception):
    """A load brought other bytes than were saved."""


class Bench:
    """The raw disk and one contender, in turn, over one state."""

    def __init__(self, spec: Spec) -> None:
        self.spec, self.folder = spec, Path(spec.folder)
        self.mesh = init_device_mesh(spec.device, (dist.get_world_size(),))
        self.shapes = gpt_shapes(spec.nbytes)
        self.lines: list[dict[str, Any]] = []
        self.facts: dict[str, Any] = {}

    def compare(self) -> None:
        """Rounds of one save and a load into each layout. The last step stays, for the next part."""
        state = self.state()
        raw, contender = self.raw(state.nbytes()), self.contender("saved", state)
        self.facts |= {"bytes": total(state.nbytes()), "tensors": len(state.named())}
        for step in range(self.spec.rounds + 1):
            self.warm(step, state.nbytes())
            self.line("raw", "save", lambda _=step: asdict(raw.save()), step)
            self.read_raw(raw, "rows", step)
            self.warm(step, state.nbytes())
            if not self.line("contender", "save", lambda at=step: asdict(contender.save(at)), step):
                break
            for layout in LAYOUTS:
                self.load(contender, layout, layout, saved=step, step=step)
            if step < self.spec.rounds:
                on_first_rank(lambda at=step: contender.remove(at))
        self.facts["direct"] = raw.direct
        contender.close()

    def fewer(self) -> None:
        """Loads of what `compare` has saved, by another number of ranks, and a save for `more`."""
        into = self.state()
        raw = self.raw(into.nbytes())
        raw.save()
        contender = self.contender("saved", into)
        for step in range(self.spec.rounds + 1):
            self.read_raw(raw, "fewer", step)
            self.load(contender, "fewer", "rows", saved=self.spec.rounds, step=step)
        raw.remove()
        contender.close()
        writer = self.contender("again", into)
        writer.save(0)
        writer.close()

    def more(self) -> None:
        into = self.state()
        raw = self.raw(into.nbytes())
        raw.save()
        contender = self.contender("again", into)
        for step in range(self.spec.rounds + 1):
            self.read_raw(raw, "more", step)
            self.load(contender, "more", "rows", saved=0, step=step)
        raw.remove()
        contender.close()

    def sweep(self) -> None:
        """The raw disk, gone at in each way, by all ranks at once: bytes a second of writes and reads."""
        nbytes = min(self.spec.nbytes, SWEEP_BYTES) // dist.get_world_size()
        path = self.folder / f"raw-{dist.get_rank()}"
        for way in WAYS:
            for _ in range(2):
                dist.barrier()
                written, read = worst(dict(zip(("write", "read"), seconds_of(path, nbytes, way), strict=True))).values()
                self.lines.append({"way": way, "write": total(nbytes) / written, "read": total(nbytes) / read})

    def replicas(self) -> None:
        self.facts |= replicas(self.folder, self.shapes, self.mesh)

    def state(self) -> Live:
        state = live(self.shapes, "rows", self.mesh)
        state.fill()
        return state

    def raw(self, nbytes: int) -> RawDisk:
        return RawDisk(self.folder, nbytes, Way(*self.spec.write), Way(*self.spec.read))

    def contender(self, name: str, state: Live) -> Contender:
        return ALL[self.spec.contender](self.folder / name, state)

    def read_raw(self, raw: RawDisk, work: str, step: int) -> None:
        def read() -> dict[str, float]:
            began = time.perf_counter()
            raw.load()
            return {"seconds": time.perf_counter() - began}

        on_first_rank(self.evict)
        self.line("raw", work, read, step)

    def load(self, contender: Contender, work: str, layout: Layout, *, saved: int, step: int) -> None:
        gc.collect()  # the state that was loaded before: an optimizer refers to itself
        into = live(self.shapes, layout, self.mesh)
        into.clear()
        on_first_rank(self.evict)
        read = 0

        def load() -> dict[str, float]:
            nonlocal read
            began = time.perf_counter()
            read = contender.load(saved, into)
            return {"seconds": time.perf_counter() - began}

        if self.line("contender", work, load, step):
            self.lines[-1]["read_per_wanted"] = total(read) / total(into.nbytes())
            wrong = total(len(into.wrong()))
            if wrong and self.spec.contender == OURS:
                raise WrongBytesError(f"{work}: {wrong} tensors differ over all ranks, {into.wrong()[:1]} first here")
            if wrong:
                self.lines[-1] = {
                    "who": "contender",
                    "work": work,
                    "first": step == 0,
                    "failed": "it brought other bytes",
                }

    def line(self, who: str, work: str, measure: Callable[[], dict[str, float]], step: int) -> bool:
        """Note what the slowest rank took for it, or why it failed; whether it did not."""
        trouble, taken = None, {}
        try:
            taken = measure()
        except Exception as error:
            if who == "raw" or self.spec.contender == OURS:
                raise
            traceback.print_exc()
            trouble = f"{type(error).__name__}: {error}".split("\n")[0]
        troubles: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(troubles, trouble)
        failed = next((one for one in troubles if one is not None), None)
        found: dict[str, Any] = {"failed": failed} if failed is not None else worst(taken)
        self.lines.append({"who": who, "work": work, "first": step == 0, **found})
        return failed is None

    def warm(self, step: int, nbytes: int) -> None:
        """What the page cache takes next was in use just now, as `evict` leaves it; not so in the first round."""
        if step > 0:
            warm_page_cache(self.folder / f"warm-{dist.get_rank()}", nbytes)
        dist.barrier()
        on_first_rank(os.sync)

    def evict(self) -> None:
        self.facts["evicted_by"] = evict(self.folder, everything=self.spec.drop_caches)


def worst(numbers: dict[str, float]) -> dict[str, float]:
    """The largest of all ranks, name by name."""
    values = torch.tensor(list(numbers.values()), dtype=torch.float64)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return dict(zip(numbers, values.tolist(), strict=True))


def total(number: int) -> int:
    """The sum over all ranks."""
    value = torch.tensor(number)
    dist.all_reduce(value)
    return int(value)


def on_first_rank(call: Callable[[], None]) -> None:
    """All ranks go on together once the first has made the call."""
    if dist.get_rank() == 0:
        call()
    dist.barrier()


def main(spec: Spec) -> None:
    backend = "gloo"
    if spec.device == "cuda":
        devices, ranks = torch.cuda.device_count(), int(os.environ.get("WORLD_SIZE", "1"))
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % devices)
        backend = "cpu:gloo,cuda:nccl" if devices >= ranks else "gloo"  # NCCL refuses ranks that share a device
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    bench = Bench(spec)
    getattr(bench, spec.part)()
    if dist.get_rank() == 0:
        Path(spec.out).write_text(json.dumps({"facts": bench.facts, "lines": bench.lines}))
    leave_group()


if __name__ == "__main__":
    main(Spec(**json.loads(sys.argv[1])))
