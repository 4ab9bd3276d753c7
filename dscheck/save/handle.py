"""What `save()` returns: awaitable moments, and what the save has cost."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from dscheck.errors import DeadlineError

GRACE_S = 5.0
"""How long past its deadline a save may take to find its error, before the waiter raises one of its own."""

CAUSES = ("call", "fence", "host_memory", "storage", "commit")


@dataclass(slots=True)
class SaveStats:
    """What one save moved and cost on this rank.

    bytes: what this rank captures, in bytes. captured_s, written_s, committed_s: wall-clock seconds from its beginning,
    after any wait for earlier saves, until the live tensors were free, the data file was durable, and the step existed;
    None as long as that has not happened. durable_s: until it existed in the shared tier, to which this rank uploaded
    uploaded_bytes; with one tier that is committed_s. in_flight: saves under way on this rank when it began, itself
    included.

    stall_s: seconds that it took from training, by cause. "call": work inside `save()` itself. "fence": copies that an
    optimizer step had to wait for. "host_memory": no room to capture into. "storage": `save()` waited until earlier
    saves had been written. "commit": `save()` waited until the ranks had agreed on a plan for a state of new structure.
    "fence" is whole when the save has ended.
    """

    bytes: int = 0
    captured_s: float | None = None
    written_s: float | None = None
    committed_s: float | None = None
    durable_s: float | None = None
    uploaded_bytes: int = 0
    in_flight: int = 1
    stall_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CAUSES, 0.0))


class SaveHandle:
    """One save under way. All methods may be called from any thread."""

    def __init__(self, step: int, timeout_s: float, upload_timeout_s: float | None = None) -> None:
        """`upload_timeout_s`: how long its upload to the shared tier may take; None: it is committed there at once."""
        self.step = step
        self.stats = SaveStats()
        self.began = time.monotonic()
        self.deadline = self.began + timeout_s
        self._captured = threading.Event()
        self._finished = threading.Event()
        self._error: Exception | None = None
        self._ending = threading.Lock()
        self._upload_timeout_s = upload_timeout_s
        self._upload_error: Exception | None = None
        self._upload_over = threading.Event()
        self._durable = False

    def __repr__(self) -> str:
        stats = self.stats
        if not self.done:
            state = "being captured" if stats.captured_s is None else "captured, not committed yet"
        elif self._error is not None:
            state = f"failed: {type(self._error).__name__}: {self._error}"
        else:
            state = f"committed in {stats.committed_s or 0.0:.3f} s, stall {sum(stats.stall_s.values()):.6f} s"
        return f"SaveHandle(step={self.step}, {stats.bytes} bytes, {state})"

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

    @property
    def durable(self) -> bool:
        """Whether the step is committed in the shared tier, which alone outlives a node."""
        return self._durable

    @property
    def upload_error(self) -> Exception | None:
        """Why the last try to upload the step failed, or None. The next save tries again."""
        return self._upload_error

    def wait_durable(self, timeout_s: float | None = None) -> None:
        """Return when the step is committed in the shared tier. Raises what `wait` does, and the error of its upload.

        None waits as long as save and upload may take; uploads of earlier steps come first.
        """
        until = time.monotonic() + (self._longest_s() if timeout_s is None else timeout_s)
        self._wait(self._finished, max(0.0, until - time.monotonic()), "committed")
        self._wait(self._upload_over, max(0.0, until - time.monotonic()), "uploaded")
        if self._upload_error is not None:
            raise self._upload_error

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
        """The live tensors are free again; the first time counts."""
        with self._ending:
            if not self._captured.is_set():
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
                if self._upload_timeout_s is None:
                    self._become_durable()
            self._captured.set()
            self._finished.set()

    def uploaded(self, error: Exception | None = None, nbytes: int = 0) -> None:
        """A try to upload it has ended. One that fails may be followed by one that does not."""
        with self._ending:
            if self._durable:
                return
            self._upload_error = error
            self.stats.uploaded_bytes += nbytes
            if error is None:
                self._become_durable()
            self._upload_over.set()

    def _become_durable(self) -> None:
        self._durable = True
        self.stats.durable_s = time.monotonic() - self.began
        self._upload_over.set()

    def _longest_s(self) -> float:
        return max(0.0, self.deadline - time.monotonic()) + (self._upload_timeout_s or 0.0) + 2 * GRACE_S
