"""Retention beside a job that saves: a thread of rank 0 deletes what falls out, and no save waits for it (C8)."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from dscheck.commit.retention import Retention
from dscheck.config import Keep
from dscheck.errors import SupersededError
from dscheck.manifest.record import Record, Term
from dscheck.storage.base import Storage

log = logging.getLogger("dscheck")


@dataclass(slots=True)
class RetentionStats:
    """What `keep` has done: steps deleted, their bytes, seconds spent; runs that failed, and the last one's error."""

    steps: int = 0
    bytes: int = 0
    seconds: float = 0.0
    failures: int = 0
    error: str | None = None


class Retainer:
    """Runs the rule after commits, one run at a time, each for all commits since the last one."""

    def __init__(self, storage: Storage, keep: Keep | None) -> None:
        self.stats = RetentionStats()
        self._storage = storage
        self._retention = None if keep is None else Retention(storage, keep)
        self._lock = threading.Lock()
        self._term: Term | None = None
        self._committed: list[Record] = []
        self._thread: threading.Thread | None = None
        self._closed = False

    def wake(self, term: Term, record: Record) -> None:
        """The owner of `term` has committed a step. Returns at once, and never raises."""
        with self._lock:
            if self._retention is None or self._closed:
                return
            self._committed = [*self._committed, record] if self._term in (None, term) else [record]
            self._term = term
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="dscheck-retain", daemon=True)
                try:
                    self._thread.start()
                except RuntimeError as error:  # the system starts no more threads: the next commit tries again
                    self._thread = None
                    self._fail(error)

    def close(self, patience_s: float) -> None:
        """Take no other term, and wait so long for what is under way. What is left, the next job's runs delete."""
        with self._lock:
            self._closed, thread = True, self._thread
        if thread is not None:
            thread.join(patience_s)

    def _work(self) -> None:
        while True:
            with self._lock:
                term, committed = self._term, self._committed
                self._term, self._committed = None, []
                if term is None:
                    self._thread = None
                    return
            self._run(term, committed)

    def _run(self, term: Term, committed: Sequence[Record]) -> None:
        assert self._retention is not None
        began = time.monotonic()
        try:
            by = f"retention on {socket.gethostname()}"
            done = self._retention.run(term, committed, by=by, now=time.time())
            self.stats.steps += len(done.steps)
            self.stats.bytes += done.bytes
        except SupersededError:
            log.info("a newer job owns %s: its retention decides now", self._storage.url)
        except Exception as error:
            self._fail(error)
        self.stats.seconds += time.monotonic() - began

    def _fail(self, error: Exception) -> None:
        self.stats.failures += 1
        self.stats.error = f"{type(error).__name__}: {error}"
        log.warning("old steps could not be deleted: %s", error)
        with contextlib.suppress(RuntimeWarning):  # raised where warnings are errors
            warnings.warn(
                f"dscheck: old steps could not be deleted, saves go on: {error}", RuntimeWarning, stacklevel=1
            )
