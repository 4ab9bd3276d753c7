"""What `save()` returns: two awaitable moments, and what the save has cost."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from dscheck.errors import DeadlineError

GRACE_S = 5.0
"""How long past its deadline a save may take to find its error, before the waiter raises one of its own."""


@dataclass(slots=True)
class SaveStats:
    """What one save moved and cost on this rank. Seconds are wall-clock, `stall_s` is what the training thread lost.

    stall_s by cause: "call" (inside `save()` itself), "fence" (an optimizer step that waited for copies), "host_memory"
    (the region to capture into had to grow), "storage" (an earlier save was still being written), "commit" (waited for
    other ranks: always 0 in this version, which never does).
    """

    bytes: int = 0
    captured_s: float | None = None
    written_s: float | None = None
    committed_s: float | None = None
    stall_s: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("call", "fence", "host_memory", "storage", "commit"), 0.0)
    )


class SaveHandle:
    """One save under way. All methods may be called from any thread."""

    def __init__(self, step: int, timeout_s: float) -> None:
        self.step = step
        self.stats = SaveStats()
        self.began = time.monotonic()
        self.deadline = self.began + timeout_s
        self._captured = threading.Event()
        self._finished = threading.Event()
        self._error: Exception | None = None
        self._ending = threading.Lock()

    def __repr__(self) -> str:
        state = "under way" if not self.done else f"failed: {self._error}" if self._error else "committed"
        return f"SaveHandle(step={self.step}, {state})"

    @property
    def done(self) -> bool:
        """Whether the save has ended, committed or not."""
        return self._finished.is_set()

    @property
    def error(self) -> Exception | None:
        """Why it failed, or None. SaveSkippedError when it was skipped by `when_busy="skip"`."""
        return self._error

    def wait_captured(self, timeout_s: float | None = None) -> None:
        """Return when the live tensors may change without harm to this save. Raises its error, or DeadlineError."""
        self._wait(self._captured, timeout_s, "captured")

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when the step is committed: it exists, on all ranks, for ever. Raises its error, or DeadlineError.

        None waits up to the save's own deadline.
        """
        self._wait(self._finished, timeout_s, "committed")

    def join(self, timeout_s: float) -> bool:
        """Whether the save has ended, one way or the other, within this time."""
        return self._finished.wait(timeout_s)

    def _wait(self, moment: threading.Event, timeout_s: float | None, name: str) -> None:
        if timeout_s is None:
            timeout_s = max(0.0, self.deadline - time.monotonic()) + GRACE_S
        if not moment.wait(timeout_s):
            raise DeadlineError(
                f"step {self.step} was not {name} within {timeout_s:.1f} s; the save goes on until its own deadline",
                step=self.step,
                phase=name,
            )
        if self._error is not None:
            raise self._error

    def captured(self) -> None:
        """The live tensors are free again."""
        self.stats.captured_s = time.monotonic() - self.began
        self._captured.set()

    def finish(self, error: Exception | None = None) -> None:
        """The save has ended; the first end counts."""
        with self._ending:
            if self.done:
                return
            self._error = error
            if error is None:
                self.stats.committed_s = time.monotonic() - self.began
            self._captured.set()
            self._finished.set()
