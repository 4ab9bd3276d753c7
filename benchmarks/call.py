"""What a save costs the training thread in the call, on the CPU, by the tensor: `python -m benchmarks.call`."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpt import GPT, Shape
from dscheck import Checkpointer
from dscheck.state import LiveState

TENSORS_A_BLOCK = 40  # ten parameters, each with two moments and a step
WIDTH = 16


def make(tensors: int) -> dict[str, Any]:
    """A GPT of about so many tensors, so small that only their number counts, after a step of AdamW."""
    model = GPT(Shape(WIDTH, WIDTH, WIDTH, 2, WIDTH, max(1, tensors // TENSORS_A_BLOCK)))
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "step": 0}
    train(state)
    return state


def train(state: dict[str, Any]) -> None:
    tokens = torch.zeros(1, WIDTH, dtype=torch.int64)
    state["model"](tokens, tokens).backward()
    state["optimizer"].step()
    state["optimizer"].zero_grad()
    state["scheduler"].step()
    state["step"] += 1


def median_s(call: Callable[[], Any], between: Callable[[], Any], repeats: int) -> float:
    """Of several calls, with what happens between them left out."""
    times = []
    for _ in range(repeats):
        between()
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure(tensors: int, repeats: int) -> tuple[int, dict[str, float]]:
    """How many tensors the state has, and the seconds of each call."""
    state = make(tensors)
    live = LiveState(state, rank=0, world=1)
    found = {
        "flatten, first": median_s(lambda: LiveState(state, rank=0, world=1).flatten(), lambda: None, repeats),
        # A step on the CPU leaves nothing of the state, nor of the code that reads it, in the caches.
        "flatten, unchanged, after a step": median_s(live.flatten, lambda: train(state), repeats),
        "flatten, unchanged, at once again": median_s(live.flatten, live.flatten, repeats),
    }
    with Checkpointer("memory://call", state, timeout_s=120.0) as ckpt:
        found["save, first"] = median_s(lambda: ckpt.save(1), lambda: None, 1)

        def settle() -> None:
            ckpt.save(state["step"] + 1).wait(60.0)
            train(state)
            train(state)

        found["save, unchanged, after a step"] = median_s(lambda: ckpt.save(state["step"]), settle, repeats)
    return len(live.flatten().tensors), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tensors", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    count, found = measure(options.tensors, options.repeats)
    print(f"{count} tensors, medians of {options.repeats}, torch {torch.__version__}")
    for name, seconds in found.items():
        print(f"{name:34} {seconds * 1e3:8.3f} ms {seconds * 1e6 / count:8.3f} us a tensor")


if __name__ == "__main__":
    main()
