"""Trying again: what may succeed later is tried later, at random moments, until patience or somebody ends it."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from dscheck.errors import TransientStorageError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long to go on after a first TransientStorageError, and how long to pause between tries.

    Pauses are drawn from [0, first_s * 2**n], at most [0, longest_s] ("full jitter"): ranks that failed together do not
    come back together. A pause may be 0, so a store that is there again is found soon.
    """

    patience_s: float = 120.0
    first_s: float = 0.1
    longest_s: float = 5.0

    def run(self, call: Callable[[], T], stop: threading.Event | None = None) -> T:
        """What `call` returns, at last. Raises its last error once patience is over or `stop` is set, saying how often
        it was tried, and any other error at once.
        """
        began, tries = time.monotonic(), 0
        while True:
            try:
                return call()
            except TransientStorageError as error:
                tries += 1
                pause_s = random.uniform(0, min(self.longest_s, self.first_s * 2**tries))
                if (stop is not None and stop.is_set()) or time.monotonic() + pause_s - began > self.patience_s:
                    raise TransientStorageError(
                        f"{error} (tried {tries} times in {time.monotonic() - began:.1f} s)", **error.fields
                    ) from error
            (stop or threading.Event()).wait(pause_s)
