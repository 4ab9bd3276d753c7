"""The training that benchmarks.stall saves, and clocks that agree on when the device did what."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from benchmarks.gpt import GPT, Shape

# 1.31 billion parameters, 15.7 GB with AdamW's two moments in fp32.
LARGE = Shape(vocabulary=50304, length=512, width=2048, heads=16, hidden=8192, layers=24)
# 98 million parameters, 1.2 GB.
MIDDLE = Shape(vocabulary=16384, length=512, width=768, heads=12, hidden=3072, layers=12)
TINY = Shape(vocabulary=256, length=16, width=32, heads=2, hidden=64, layers=2)
STEP_S = 0.160
ROWS = 256


class Training:
    """A GPT with weights in fp32, forward and backward in bf16, fused AdamW, on random tokens that lie on the device.

    `guard` is entered round every optimizer step, for those whose users must lock it. `marks`: where a step's moments
    go: its begin, the begin of its optimizer's step, and its end.
    """

    def __init__(self, shape: Shape, batch: int, device: torch.device, seed: int = 1) -> None:
        torch.manual_seed(seed)
        self.device, self.batch, self.steps = device, batch, 0
        with device:
            self.model = GPT(shape)
            self._text = torch.randint(shape.vocabulary, (ROWS, shape.length + 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.guard: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.marks: Timeline | None = None

    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer}

    def state_dicts(self) -> dict[str, Any]:
        """What users of the others hand over, the tied weight once."""
        weights = self.model.state_dict()
        del weights["head.weight"]
        return {"model": weights, "optimizer": self.optimizer.state_dict()}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All of the state by name, tied tensors once: weights, and what the optimizer keeps for each."""
        for name, weight in self.model.named_parameters():
            yield name, weight.detach()
            for key, value in self.optimizer.state[weight].items():
                yield f"{name}.{key}", value

    def nbytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in self.tensors())

    def train_step(self) -> None:
        start = self.steps * self.batch % (ROWS - self.batch + 1)
        rows = self._text[start : start + self.batch]
        self._mark()
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.model(rows[:, :-1], rows[:, 1:])
        self.optimizer.zero_grad()
        loss.backward()
        self._mark()
        with self.guard():
            self.optimizer.step()
        self._mark()
        self.steps += 1

    def run(self, steps: int) -> float:
        """Seconds of that many steps, from an idle device to an idle device."""
        synchronize(self.device)
        return self.run_on(steps)

    def run_on(self, steps: int) -> float:
        """Seconds of that many more steps, until the device has done all it was given before, too."""
        began = time.perf_counter()
        for _ in range(steps):
            self.train_step()
        synchronize(self.device)
        return time.perf_counter() - began

    def marked(self, steps: int) -> list[tuple[float, float, float]]:
        """The moments of that many steps."""
        self.marks = Timeline(self.device)
        try:
            self.run(steps)
            moments = self.marks.moments()
        finally:
            self.marks = None
        return [(moments[at], moments[at + 1], moments[at + 2]) for at in range(0, len(moments), 3)]

    def _mark(self) -> None:
        if self.marks is not None:
            self.marks.mark()


class Timeline:
    """Moments at which the device gets to a point of its stream, in seconds of time.monotonic()."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []
        synchronize(device)
        if self._cuda:
            # On an idle device an event is over as soon as it is recorded: both clocks are read at one moment.
            self._zero = self._event()
            self._zero.synchronize()
        self._began = time.monotonic()

    def mark(self) -> None:
        self._marks.append(self._event() if self._cuda else time.monotonic())

    def moments(self) -> list[float]:
        """Of all marks, in order. Waits for the last."""
        if not self._cuda:
            return list(self._marks)
        if self._marks:
            self._marks[-1].synchronize()
        return [self._began + self._zero.elapsed_time(mark) / 1e3 for mark in self._marks]

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def fitting_batch(shape: Shape, device: torch.device) -> int:
    """The batch with which a step takes about STEP_S; what a step costs is a straight line through two of them."""
    job = Training(shape, 4, device)
    job.run(3)
    few = job.run(4) / 4
    job.batch = 12
    job.run(2)
    many = job.run(4) / 4
    each = (many - few) / 8
    return max(1, min(32, round((STEP_S - few) / each) + 4)) if each > 0 else 12


def phases(moments: list[tuple[float, float, float]]) -> dict[str, float]:
    """Median milliseconds of a step's parts."""
    return {
        "forward_backward_ms": 1e3 * statistics.median(middle - begin for begin, middle, _ in moments),
        "optimizer_ms": 1e3 * statistics.median(end - middle for _, middle, end in moments),
        "step_ms": 1e3 * statistics.median(b[2] - a[2] for a, b in itertools.pairwise(moments)),
    }
