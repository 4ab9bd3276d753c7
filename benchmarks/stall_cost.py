"""The loop that says what a save costs, whoever makes it."""

from __future__ import annotations

import itertools
import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.stall_job import Training

WARM_STEPS = 2
LONGEST_TAIL_S = 60.0


class Method(Protocol):
    """One way to save a Training."""

    def save(self, step: int) -> None:
        """What the training loop calls."""

    def guard(self) -> AbstractContextManager[Any]:
        """What its users put round the optimizer's step."""

    def busy(self) -> bool:
        """Whether the last save goes on in the background."""

    def wait(self) -> float:
        """Seconds from the last save's call to its end, once it has ended. Raises what went wrong with it."""

    def remove(self, step: int) -> None:
        """Free the memory that the saved step takes."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of training with one save in it, in seconds: the call, all of it, until the save was persisted, and
    what the loop took for the steps until then.
    """

    call: float
    whole: float
    persisted: float
    until_steps: int
    until: float


def window(job: Training, method: Method, steps: int) -> Window:
    """`steps` steps with a save after the second, then more until it is persisted, none of which are in `whole`."""
    job.run(WARM_STEPS)
    began = time.perf_counter()
    for _ in range(WARM_STEPS):
        job.train_step()
    called, step = time.perf_counter(), job.steps
    method.save(step)
    returned = time.perf_counter()
    whole = returned - began + job.run_on(steps - WARM_STEPS)
    taken, until = steps, whole
    going_on = time.perf_counter()
    while method.busy() and time.perf_counter() - going_on < LONGEST_TAIL_S:
        job.train_step()
        taken += 1
    until += time.perf_counter() - going_on + job.run_on(0)
    seen = Window(returned - called, whole, method.wait(), taken, until)
    method.remove(step)
    return seen


def measure(job: Training, method: Method, windows: int, steps: int) -> dict[str, Any]:
    """What a save costs the loop, in milliseconds: each window with a save less the mean of those round it without.

    A save that fails after others is told as "failed", and ends the measuring; the first one raises.
    """
    saving: list[Window] = []
    failed = {}
    job.guard = method.guard
    try:
        plain = [_plain(job, steps)]
        for _ in range(windows):
            saving.append(window(job, method, steps))
            plain.append(_plain(job, steps))
    except Exception as error:
        if not saving:
            raise
        failed["failed"] = f"save {len(saving) + 1}: {type(error).__name__}: {error}"
        del saving[len(plain) - 1 :]
    finally:
        # A method holds memory, which the next one is to find free.
        job.guard = nullcontext
    round_each = [(before + after) / 2 for before, after in itertools.pairwise(plain)]
    extra = [1e3 * (one.whole - other) for one, other in zip(saving, round_each, strict=True)]
    until = [1e3 * (one.until - other / steps * one.until_steps) for one, other in zip(saving, round_each, strict=True)]
    return failed | {
        "step_ms": 1e3 * statistics.median(plain) / steps,
        "extra_ms": extra,
        "extra_until_persisted_ms": until,
        "call_ms": [1e3 * one.call for one in saving],
        "persisted_s": [one.persisted for one in saving],
    }


def _plain(job: Training, steps: int) -> float:
    job.run(WARM_STEPS)
    return job.run(steps)
