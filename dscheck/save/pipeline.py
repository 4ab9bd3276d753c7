"""The background of one rank: attempts go through two threads, in order, until it is closed or given up."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

from dscheck.config import Settings
from dscheck.errors import DscheckError, SaveSkippedError, SupersededError
from dscheck.ranks.base import Ranks
from dscheck.save.attempt import Attempt
from dscheck.save.coordinator import Coordinator
from dscheck.save.handle import GRACE_S
from dscheck.save.stages import Stages, Standing
from dscheck.snapshot import Capturer, Fences
from dscheck.storage import Tiers

log = logging.getLogger("dscheck")


class Pipeline:
    """`dscheck-capture` follows the copies of each attempt, `dscheck-save` plans, writes and commits it.

    Either may hang in a call that knows no deadline. The pipeline is then given up as a whole, with the memory that
    they may still touch, and with the coordinator: whichever thread ends last closes the capturer.
    """

    def __init__(
        self,
        tiers: Tiers,
        ranks: Ranks,
        settings: Settings,
        fences: Fences,
        coordinator: Coordinator,
        agreed: Standing,
    ) -> None:
        self._storage, self._ranks, self._fences = tiers.near, ranks, fences
        self.coordinator, self.standing = coordinator, agreed
        self.capturer = Capturer(settings, fences.steps)
        self.superseded: SupersededError | None = None
        self._reason: DscheckError | None = None
        self._broken = False
        self._stages = Stages(tiers, ranks, settings, agreed, self.capturer.plan, self._check)
        self._captures: queue.SimpleQueue[Attempt | None] = queue.SimpleQueue()
        self._saves: queue.SimpleQueue[Attempt | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._running = 2
        self._process, self._until = os.getpid(), 0.0
        self._ending = threading.Lock()

    @property
    def works(self) -> bool:
        """Whether its threads live, if they were started, and its memory is its own."""
        return not self._broken and all(thread.is_alive() for thread in self._threads)

    def start(self) -> None:
        """Start the threads, unless they run: some milliseconds that a first save would else cost training."""
        if not self._threads:
            atexit.register(self._end_with_process)
        both = ("dscheck-capture", self._follow), ("dscheck-save", self._work)
        for name, work in both[len(self._threads) :]:  # the system may have given one only
            self._threads.append(self._thread(name, work))

    def put(self, attempt: Attempt) -> None:
        """Take it through after all that were put before. One that has ended only tells the others, and its trace."""
        self.start()
        self._until = attempt.handle.deadline + GRACE_S
        self._captures.put(attempt)
        self._saves.put(attempt)

    def attend(self, attempt: Attempt) -> None:
        """One attempt from beginning to end. Nothing escapes: it shows on the handle and in a warning (C8)."""
        if attempt.ended:
            self.tell(attempt)
        else:
            error: Exception | None = None
            try:
                self._stages.run(attempt)
            except BaseException as failure:
                error = (
                    failure if isinstance(failure, Exception) else DscheckError(f"a save was broken off: {failure!r}")
                )
                self._stages.tell(attempt, error)
            if not self.end(attempt, error):
                return  # given up meanwhile: another thread sees to the rest
        attempt.write_trace(self._storage.url)

    def tell(self, attempt: Attempt) -> None:
        """No rank waits for an attempt that ended here before its turn."""
        self._stages.tell(attempt, attempt.handle.error)

    def end(self, attempt: Attempt, error: Exception | None) -> bool:
        """Let go of all that the attempt holds, and tell its handle; False when it had ended before."""
        if not attempt.end():
            return False
        try:
            self._let_go(attempt, error)
        except Exception as failure:
            error = error or failure
        if isinstance(error, SupersededError):
            self.superseded = error
        if error is not None and not attempt.planned and not isinstance(error, SaveSkippedError):
            self.standing.digest = ""  # rank 0 may have lost what this rank sent, or taken in what it did not answer
        attempt.handle.finish(error)
        if error is not None and not attempt.told and not isinstance(error, SaveSkippedError):
            log.error("save of step %d failed: %s", attempt.step, error)
            with contextlib.suppress(RuntimeWarning):  # raised where warnings are errors: this thread must live
                warnings.warn(f"dscheck: the save of step {attempt.step} failed: {error}", RuntimeWarning, stacklevel=1)
        return True

    def _let_go(self, attempt: Attempt, error: Exception | None) -> None:
        capture, attempt.capture, attempt.moment = attempt.capture, None, None
        if capture is None:
            return
        if error is not None:
            capture.fail(error)
        self._fences.release(capture)
        if not capture.release():
            self._broken = True  # a copy that hangs still writes to the region
        attempt.handle.stats.stall_s |= {"fence": capture.fence_s, "host_memory": capture.host_memory_s}
        if attempt.trace.on:
            attempt.spans = capture.spans

    def stop(self, reason: DscheckError) -> None:
        """Every attempt fails by `reason` as soon as its thread looks."""
        self._reason = reason

    def withdraw(self) -> list[Attempt]:
        """Take back the attempts that the thread of the saves has not begun."""
        attempts = []
        with contextlib.suppress(queue.Empty):
            while (attempt := self._saves.get_nowait()) is not None:
                attempts.append(attempt)
        return attempts

    def close(self, patience_s: float = 0.0) -> None:
        """Let the threads end when they have done all that was put in, and wait so long for them."""
        self._captures.put(None)
        self._saves.put(None)
        until = time.monotonic() + patience_s
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        if not self._threads:
            atexit.unregister(self._end_with_process)  # registered by a start that the system refused
            self.capturer.close()

    def _end_with_process(self) -> None:
        """The process ends and nobody has closed this: wait for what is under way, unless an exception ended it.

        Later no thread may come back from native code: Python up to 3.13 would then end the process by an abort.
        """
        if os.getpid() != self._process:
            return
        if getattr(sys, "last_value", None) is not None:
            self.stop(DscheckError("the process ended by an exception"))
            self.close(GRACE_S)
        else:
            self.close(max(0.0, self._until - time.monotonic()))

    def _check(self) -> None:
        if (reason := self._reason or self.superseded) is not None:
            raise reason

    def _thread(self, name: str, work: Callable[[], Any]) -> threading.Thread:
        thread = threading.Thread(target=self._until_closed, args=(work,), name=name, daemon=True)
        thread.start()
        return thread

    def _until_closed(self, work: Callable[[], Any]) -> None:
        try:
            work()
        finally:
            with self._ending:
                self._running -= 1
                last = self._running == 0
            if last:
                self.capturer.close()
                atexit.unregister(self._end_with_process)

    def _follow(self) -> None:
        while (attempt := self._captures.get()) is not None:
            self._follow_one(attempt)
            del attempt  # with its capture: to let go of it at the next save would take that one's time

    def _follow_one(self, attempt: Attempt) -> None:
        if (capture := attempt.capture) is None:
            return
        with contextlib.suppress(Exception):  # the thread of the saves meets the same error, and sees to it
            capture.wait()
            attempt.settle("copies")

    def _work(self) -> None:
        while (attempt := self._saves.get()) is not None:
            self.attend(attempt)
            del attempt
