"""One rank of benchmarks.versus: rounds of save, load and reshard by every contender in turn, checked bit for bit."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.contenders import ALL, Contender, DcpAsync, RawDisk
from benchmarks.launch import leave_group
from benchmarks.raw_disk import evict, warm_page_cache
from benchmarks.sharded_state import Layout, gpt_shapes, live

LAYOUTS: tuple[Layout, ...] = ("rows", "columns", "stages")


class WrongBytesError(Exception):
    """A load brought other bytes than were saved."""


class Comparison:
    """All contenders over one state, of which every rank holds rows of each tensor."""

    def __init__(self, folder: Path, nbytes: int, *, drop_caches: bool) -> None:
        self.mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self.shapes = gpt_shapes(nbytes)
        self.folder, self.drop_caches = folder, drop_caches
        self.state = live(self.shapes, "rows", self.mesh)
        self.state.fill()
        self.contenders = [make(folder / str(number), self.state) for number, make in enumerate(ALL)]
        self.evicted_by = ""

    def round(self, step: int) -> list[dict[str, Any]]:
        """What each contender took, in an order that turns from round to round."""
        turn = step % len(self.contenders)
        return [self.measure(contender, step) for contender in self.contenders[turn:] + self.contenders[:turn]]

    def measure(self, contender: Contender, step: int) -> dict[str, Any]:
        """One save by all ranks, then a load into each layout; the slowest rank's seconds."""
        self.warm(step)
        on_first_rank(os.sync)
        saved = worst(asdict(contender.save(step)))
        layouts = LAYOUTS[:1] if isinstance(contender, RawDisk) else () if isinstance(contender, DcpAsync) else LAYOUTS
        loads = {layout: self.load(contender, step, layout) for layout in layouts}
        on_first_rank(lambda: contender.remove(step))
        return {"contender": contender.name, "save": saved, "loads": loads}

    def load(self, contender: Contender, step: int, layout: Layout) -> dict[str, float]:
        into = live(self.shapes, layout, self.mesh)
        into.clear()
        on_first_rank(self.evict)
        began = time.perf_counter()
        read_per_wanted = contender.load(step, into)
        taken = worst({"seconds": time.perf_counter() - began, "read_per_wanted": read_per_wanted})
        if not isinstance(contender, RawDisk) and (wrong := into.wrong()):
            raise WrongBytesError(f"{contender.name}, {layout}: {len(wrong)} tensors differ, '{wrong[0]}' first")
        return taken

    def warm(self, step: int) -> None:
        """What the page cache takes next was in use just now, as `evict` leaves it; not so in the first round."""
        if step > 0:
            warm_page_cache(self.folder / f"warm-{dist.get_rank()}", self.state.nbytes())
        dist.barrier()

    def evict(self) -> None:
        self.evicted_by = evict(self.folder, everything=self.drop_caches)

    def close(self) -> None:
        for contender in self.contenders:
            contender.close()


def worst(numbers: dict[str, float]) -> dict[str, float]:
    """The largest of all ranks, name by name."""
    values = torch.tensor(list(numbers.values()), dtype=torch.float64)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return dict(zip(numbers, values.tolist(), strict=True))


def on_first_rank(call: Callable[[], None]) -> None:
    """All ranks go on together once the first has made the call."""
    if dist.get_rank() == 0:
        call()
    dist.barrier()


def main(folder: str, nbytes: int, rounds: int, drop_caches: bool) -> None:
    dist.init_process_group("gloo")
    comparison = Comparison(Path(folder), nbytes, drop_caches=drop_caches)
    measured = [comparison.round(step) for step in range(rounds + 1)]
    comparison.close()
    total = torch.tensor(comparison.state.nbytes())
    dist.all_reduce(total)
    if dist.get_rank() == 0:
        facts = {
            "bytes": total.item(),
            "tensors": len(comparison.state.named()),
            "evicted_by": comparison.evicted_by,
            "direct": all(contender.direct for contender in comparison.contenders if isinstance(contender, RawDisk)),
        }
        (Path(folder) / "measured.json").write_text(json.dumps({"facts": facts, "rounds": measured}))
    leave_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "drop")
