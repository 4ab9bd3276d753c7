"""A dscheck save on every step against the bus, and the steps that run while a save drains, into a storage that takes
everything at once.
"""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import dataclass
from typing import Any

from benchmarks.prototypes import copy_rate
from benchmarks.sink import SinkStorage
from benchmarks.stall_bench import TIMEOUT_S, Bench
from benchmarks.stall_job import Timeline, Training
from dscheck import Checkpointer, SaveHandle

# Checksums of what the bus brings take more than the default four.
COPY_THREADS = 12
# Of the alignment of pieces, and where the ring ends.
SLACK_BYTES = 64 << 20
# Drains end well within.
EVERY = 4


def every_step(bench: Bench) -> None:
    job = bench.training()
    settings: dict[str, Any] = {
        "host_memory_bytes": 2 * job.nbytes() + SLACK_BYTES,
        "device_memory_bytes": "auto",
        "copy_threads": COPY_THREADS,
        "timeout_s": TIMEOUT_S,
    }
    tiny = bench.options.tiny
    with bench.folder("sink") as folder, Checkpointer(SinkStorage(folder), job.state(), **settings) as ckpt:
        bench.say("host memory is made ready")
        job.run(2 if tiny else 80)
        for _ in range(2):
            job.train_step()
            ckpt.save(job.steps).wait()
        bench.attempt("every step", lambda: _every_step(job, ckpt, 4 if tiny else 20))
        bench.attempt("drain", lambda: _drain(job, ckpt, 3 if tiny else 25))
    bench.attempt("bus", lambda: {"host_gb_s": copy_rate(bench.device, bench.copy_bytes) / 1e9})


def _every_step(job: Training, ckpt: Checkpointer, saves: int) -> dict[str, Any]:
    """Bytes captured a second, from the first call until the last capture is over."""
    plain = job.run(10)
    handles: list[SaveHandle] = []
    began = time.monotonic()
    for _ in range(saves):
        handles.append(ckpt.save(job.steps))
        job.train_step()
    job.run_on(0)
    loop = time.monotonic() - began
    for handle in handles:
        handle.wait_captured()
    ended = max(handle.began + (handle.stats.captured_s or 0.0) for handle in handles)
    for handle in handles:
        handle.wait()
    return {
        "saves": saves,
        "plain_step_ms": 1e3 * plain / 10,
        "step_ms": 1e3 * loop / saves,
        "captured_gb_s": sum(handle.stats.bytes for handle in handles) / (ended - began) / 1e9,
        "call_ms": [1e3 * handle.stats.stall_s["call"] for handle in handles],
        "stall_ms": {
            cause: 1e3 * statistics.mean(handle.stats.stall_s[cause] for handle in handles)
            for cause in handles[0].stats.stall_s
        },
    }


@dataclass(frozen=True, slots=True)
class Span:
    """Seconds of time.monotonic()."""

    began: float
    ended: float

    def meets(self, other: Span) -> bool:
        return self.began < other.ended and other.began < self.ended


def _drain(job: Training, ckpt: Checkpointer, saves: int) -> dict[str, Any]:
    """Milliseconds of steps, from the end of one to the end of the next on the device, by what drained meanwhile."""
    before = _ends_to_spans(job.marked(saves * EVERY // 3))
    steps, drains = _with_saves(job, ckpt, saves)
    after = _ends_to_spans(job.marked(saves * EVERY // 3))
    plain = _spread(before + after)
    assert plain is not None
    loop_ms = 1e3 * (steps[-1].ended - steps[0].began)
    return {
        "saves": saves,
        "every": EVERY,
        "drain_ms": _spread(drains),
        "extra_ms": (loop_ms - len(steps) * plain["mean"]) / saves,
        "plain": plain,
        **{name: _spread(spans) for name, spans in by_drain(steps, drains).items()},
    }


def _with_saves(job: Training, ckpt: Checkpointer, saves: int) -> tuple[list[Span], list[Span]]:
    """All steps, and for each save the time from what the device had been given before it until it is captured."""
    timeline = Timeline(job.device)
    handles = []
    timeline.mark()
    for _ in range(saves):
        timeline.mark()
        handles.append(ckpt.save(job.steps))
        for _ in range(EVERY):
            job.train_step()
            timeline.mark()
    moments = timeline.moments()
    for handle in handles:
        handle.wait()
    steps, drains = [], []
    last, rest = moments[0], moments[1:]
    for number, handle in enumerate(handles):
        called, *ends = rest[number * (EVERY + 1) : (number + 1) * (EVERY + 1)]
        drains.append(Span(called, handle.began + (handle.stats.captured_s or 0.0)))
        for end in ends:
            steps.append(Span(last, end))
            last = end
    return steps, drains


def by_drain(steps: list[Span], drains: list[Span]) -> dict[str, list[Span]]:
    """Steps that meet a drain: all of them, the first of each drain, in which the fence lies, and the later ones."""
    meeting = [[step for step in steps if step.meets(drain)] for drain in drains]
    return {
        "overlapped": [step for some in meeting for step in some],
        "first": [some[0] for some in meeting if some],
        "later": [step for some in meeting for step in some[1:]],
    }


def _ends_to_spans(moments: list[tuple[float, float, float]]) -> list[Span]:
    ends = [end for *_, end in moments]
    return [Span(one, other) for one, other in itertools.pairwise(ends)]


def _spread(spans: list[Span]) -> dict[str, float] | None:
    """Their number, mean, median and 99th percentile (of fewer than 100: the longest), in milliseconds."""
    lengths = sorted(1e3 * (span.ended - span.began) for span in spans)
    if not lengths:
        return None
    return {
        "count": len(lengths),
        "mean": statistics.mean(lengths),
        "p50": statistics.median(lengths),
        "p99": lengths[int(0.99 * len(lengths))],
    }
