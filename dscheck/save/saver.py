"""The training thread's side of saving: what is under way, when the next save may go on, and how all of it ends."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace

from dscheck.commit import SingleWriter
from dscheck.config import Settings
from dscheck.errors import DeadlineError, DscheckError, RankFailureError, SupersededError
from dscheck.ranks.base import Failed, Ranks
from dscheck.save.attempt import Attempt, Moment
from dscheck.save.coordinator import Coordinator, Lineage
from dscheck.save.handle import GRACE_S, SaveHandle
from dscheck.save.holdings import Holdings
from dscheck.save.pipeline import Pipeline
from dscheck.save.retainer import Retainer
from dscheck.save.shares import Shares
from dscheck.save.stages import Standing
from dscheck.save.trace import TRAINING, Trace
from dscheck.save.upload import Uploads
from dscheck.snapshot import Capture, Fences
from dscheck.state.leaf import FlatState
from dscheck.storage import Tiers

POLL_S = 0.001
"""How often a waiting `save()` looks for room: it is given back chunk by chunk, by threads that know of no waiter."""

LEAVE_POLL_S = 0.05
"""How often a rank that gives up looks whether its save has ended."""

MOST_IN_FLIGHT = 8
"""Saves under way: each holds its plain objects in memory beside the budget, and one more is lost in a crash."""


class Saver:
    """All saves of one Checkpointer on one rank. Every method is for the training thread."""

    def __init__(
        self, tiers: Tiers, ranks: Ranks, settings: Settings, fences: Fences, versions: Mapping[str, str]
    ) -> None:
        self._tiers, self._storage = tiers, tiers.near
        self._ranks, self._settings, self._fences = ranks, settings, fences
        self._host = socket.gethostname()
        committing = _single_writer(tiers) if settings.commit == "single-writer" else tiers
        keep = [one or settings.kept for one in tiers.keep]
        self.retainer = Retainer(committing.near, None if committing.shared else keep[0])
        self._pipeline = self._new_pipeline(Coordinator(committing, settings, versions, self.retainer), Standing())
        self._holdings: Holdings | None = None
        self._in_flight: deque[Attempt] = deque()
        self._skips: list[SaveHandle] = []
        self._calls = 0
        self._uploads: Uploads | None = None
        if committing.shared is not None:
            retainers = [Retainer(storage, one) for storage, one in zip(committing.storages, keep, strict=True)]
            self._uploads = Uploads(committing, committing.shared, ranks, settings, retainers, self._supersede)
            self.retainer = retainers[-1]
        self._continued: int | None = None
        """The step loaded last, until the first save after it: what waits for its upload up to there goes first."""

    @property
    def superseded(self) -> SupersededError | None:
        """Why no save of this job succeeds any more (C2)."""
        return self._pipeline.superseded

    def continue_from(self, lineage: Lineage) -> None:
        """The next save claims a new term that continues from there. Only between saves."""
        self._pipeline.coordinator.continue_from(lineage)
        self._pipeline.standing.confirmed = self._pipeline.superseded = None
        self._continued = None if lineage.parent is None else lineage.parent[1]

    def prepare(self, flat: FlatState) -> None:
        """Get threads, memory and plan ready for saves of this structure, ahead of the first one."""
        self._pipeline.start()
        self._pipeline.capturer.window_hint_s = self._fences.window_s
        self._pipeline.capturer.prepare(self._shares(self._holdings_of(flat), flat).plan)

    def upload(self, step: int) -> None:
        """What waits for its upload, up to `step`, is in the shared tier. Collective, and only between saves."""
        assert self._uploads is not None
        self._uploads.now(step)

    def save(self, step: int, flat: FlatState, began: float, metrics: Mapping[str, float | None]) -> SaveHandle:
        """Take the moment and hand it to the background; `began`: when the call did, on time.monotonic().

        Waits for earlier saves only for a first plan, or for room; with `when_busy="skip"` the step is skipped instead.
        Never raises: what fails here (memory for the region, on the host or the device) fails the save (C8).
        """
        error: Exception | None = None
        shares, waited = None, {"commit": 0.0, "storage": 0.0}
        try:
            holdings = self._holdings_of(flat)
            for cause, ready in self._conditions(holdings, flat):
                if self._settings.when_busy == "skip" and self.tidy() and not ready():
                    return self._skip(step)
                waited[cause] = self._wait(ready)
            shares = self._shares(holdings, flat)
        except Exception as failure:
            error = failure
        attempt = self._attempt(step, self._handle(step))
        attempt.error, attempt.handle.stats.in_flight = error, len(self._in_flight)
        attempt.metrics = metrics
        span = attempt.trace.open(TRAINING, "save()", began)
        taking = attempt.trace.open(TRAINING, "take the moment", time.monotonic())
        capture = None if shares is None else self._take(attempt, flat, shares)
        taking.ended = time.monotonic()
        self._enqueue(attempt)
        if capture is not None:
            capture.hold()
        self._note(attempt, capture, began, waited)
        span.ended = time.monotonic()
        return attempt.handle

    def refuse(self, step: int, error: Exception) -> None:
        """`save()` fails in the call on this rank: the others learn it, in the background."""
        attempt = self._attempt(step, self._handle(step))
        attempt.error, attempt.told = error, True
        self._enqueue(attempt)

    def decline(self, step: int, error: SupersededError) -> SaveHandle:
        """This job lost the root to a newer one: no save of it succeeds any more, which is said at every one (C2)."""
        handle = self._handle(step)
        self.refuse(step, error)
        handle.finish(error)
        warnings.warn(f"dscheck: step {step} is not saved: {error}", RuntimeWarning, stacklevel=3)
        return handle

    def tidy(self) -> bool:
        """Whether a save is under way. Those that have ended are forgotten; when the first one outlived its deadline,
        or a thread died, all of them are given up.
        """
        while self._in_flight and self._in_flight[0].handle.done:
            self._in_flight.popleft()
        if not self._pipeline.works:
            self._abandon(DscheckError("a thread in the background died, or a copy of an earlier save hangs"))
        elif self._in_flight and time.monotonic() > self._in_flight[0].handle.deadline + GRACE_S:
            self._abandon(self._overdue(self._in_flight[0].step))
        return bool(self._in_flight)

    def drain(self) -> None:
        """Return when no save is under way on this rank, one way or the other."""
        while self.tidy():
            first = self._in_flight[0].handle
            first.join(min(LEAVE_POLL_S, max(0.0, first.deadline + GRACE_S - time.monotonic())))

    def close(self, *, abort: bool) -> None:
        """End the background. `abort` tells the other ranks instead of waiting for the saves under way."""
        if abort:
            self._leave(RankFailureError("training ended by an exception", ranks=[self._ranks.rank], phase="training"))
        else:
            self.drain()
            for skip in self._skips:
                skip.join(max(0.0, skip.deadline - time.monotonic()) + GRACE_S)
        self._pipeline.close(GRACE_S)
        if self._uploads is not None:
            self._uploads.close(abort=abort)
        self.retainer.close(GRACE_S)

    def _holdings_of(self, flat: FlatState) -> Holdings:
        known = self._holdings
        if known is None or known.tensors is not flat.tensors:
            self._holdings = known = Holdings.of(flat, self._ranks.rank, self._host)
        return known

    def _shares(self, holdings: Holdings, flat: FlatState) -> Shares:
        standing = self._pipeline.standing
        full = standing.digest != holdings.digest  # read first: what was agreed is there before it
        agreed, last = standing.agreed, standing.shares
        if last is None or not last.serves(holdings, agreed, full):
            ranks = self._ranks.rank, self._ranks.size
            last = Shares.of(holdings, agreed, full, flat.locals, self._pipeline.capturer.plan, ranks, last)
            standing.shares = last
        return last

    def _conditions(self, holdings: Holdings, flat: FlatState) -> list[tuple[str, Callable[[], bool]]]:
        """What a save has to wait for, by the cause that its stall has, once another one is under way."""

        def agreed() -> bool:
            known = self._pipeline.standing.digest == holdings.digest
            return known or all(attempt.planned or attempt.handle.done for attempt in self._in_flight)

        def room() -> bool:
            return len(self._in_flight) < MOST_IN_FLIGHT and self._pipeline.capturer.room(
                self._shares(holdings, flat).plan
            )

        return [("commit", agreed), ("storage", room)]

    def _wait(self, ready: Callable[[], bool]) -> float:
        """Return, as soon as it is `ready` or nothing is under way any more, how many seconds that took."""
        began = time.monotonic()
        while self.tidy() and not ready():
            time.sleep(POLL_S)  # Ctrl-C in the wait for an event may leave its lock taken, and close() waiting for it
        return time.monotonic() - began

    def _take(self, attempt: Attempt, flat: FlatState, shares: Shares) -> Capture | None:
        capturer = self._pipeline.capturer
        try:
            attempt.moment = moment = Moment.of(flat, shares, self._fences)
            if moment.counts is None or not shares.full:
                attempt.settle("late")
            capturer.window_hint_s = self._fences.window_s
            attempt.capture = capture = capturer.take(shares.plan, flat.locals, attempt.handle.deadline, flat.memory)
            self._fences.guard(capture)
        except Exception as error:
            attempt.error = error
            return None
        return capture

    def _note(self, attempt: Attempt, capture: Capture | None, began: float, waited: dict[str, float]) -> None:
        """What the call has cost; what fences cost comes at the end."""
        stats, host_memory_s = attempt.handle.stats, 0.0
        if capture is not None:
            stats.bytes, host_memory_s = capture.nbytes, capture.host_memory_s
        call_s = time.monotonic() - began - sum(waited.values()) - host_memory_s
        stats.stall_s |= waited | {"call": max(0.0, call_s), "host_memory": host_memory_s}

    def _skip(self, step: int) -> SaveHandle:
        """Tell the others that this rank is busy, without waiting for what it is busy with."""
        attempt = self._new_attempt(step, self._handle(step))
        attempt.busy = True
        self._skips = [skip for skip in self._skips if not skip.done] + [attempt.handle]
        try:
            threading.Thread(target=self._pipeline.attend, args=(attempt,), name="dscheck-skip", daemon=True).start()
        except RuntimeError:  # the system starts no more threads: the others hear of it in its turn
            self._enqueue(attempt)
        return attempt.handle

    def _new_attempt(self, step: int, handle: SaveHandle) -> Attempt:
        self._calls += 1
        trace = Trace(self._settings.trace, step, self._ranks.rank)
        attempt = Attempt(self._calls, step, handle, self._pipeline.coordinator, trace)
        if self._uploads is not None:
            if self._continued is not None:
                self._uploads.put(None, self._continued)
                self._continued = None
            attempt.await_uploads = self._uploads.put(handle, step)
        return attempt

    def _handle(self, step: int) -> SaveHandle:
        later = None if self._uploads is None else self._settings.upload_timeout_s
        return SaveHandle(step, self._settings.timeout_s, later)

    def _supersede(self, error: SupersededError) -> None:
        self._pipeline.superseded = error

    def _attempt(self, step: int, handle: SaveHandle) -> Attempt:
        self.tidy()
        attempt = self._new_attempt(step, handle)
        self._in_flight.append(attempt)
        return attempt

    def _new_pipeline(self, coordinator: Coordinator, standing: Standing) -> Pipeline:
        return Pipeline(self._tiers, self._ranks, self._settings, self._fences, coordinator, standing)

    def _abandon(self, error: DscheckError) -> None:
        """A thread hangs in a call that knows no deadline, or died: leave it, with the memory it may still touch.

        What is under way ends with one error, also what lies behind it in the same memory; the others are told.
        """
        old = self._pipeline
        old.withdraw()
        standing = Standing(agreed=old.standing.agreed, shares=old.standing.shares)
        self._pipeline = self._new_pipeline(old.coordinator.successor(), standing)
        self._pipeline.superseded = old.superseded
        for attempt in self._in_flight:
            if old.end(attempt, error):
                self._pipeline.put(attempt)
        self._in_flight.clear()
        old.close()  # its threads end when they wake

    def _overdue(self, step: int) -> DeadlineError:
        return DeadlineError(
            f"step {step}: the save did not end by its deadline; its thread hangs in {self._storage.url}, or the "
            "capture does; it is given up, with the saves behind it",
            ranks=[self._ranks.rank],
            phase="save",
            waited_for=self._storage.url,
        )

    def _leave(self, reason: DscheckError) -> None:
        """Give up the saves under way, and let no rank wait for this one, neither there nor in the save to come."""
        pipeline = self._pipeline
        pipeline.stop(reason)
        behind = pipeline.withdraw()
        for attempt in self._in_flight:
            if (capture := attempt.capture) is not None:
                capture.fail(reason)
        self._calls += 1
        with contextlib.suppress(DscheckError):
            self._ranks.exchange(
                f"save-{self._calls}/plan",
                Failed(str(reason)),
                pipeline.coordinator.decide_plan,
                deadline=time.monotonic() + GRACE_S,
                phase="the next save",
            )
        for attempt in behind:
            pipeline.end(attempt, reason)
            pipeline.tell(attempt)
            pipeline.put(attempt)
        for attempt in self._in_flight:
            self._end_round_of(attempt)

    def _end_round_of(self, attempt: Attempt) -> None:
        """Return when the attempt has ended. While it writes it sees the reason by itself; in a round it would wait."""
        until, exchanging = time.monotonic() + GRACE_S, False
        while not attempt.handle.join(LEAVE_POLL_S) and time.monotonic() < until:
            # Seen twice: it has arrived by now, so that closing fails its round for all.
            if exchanging and attempt.exchanging:
                self._ranks.close()
            exchanging = attempt.exchanging

    def _enqueue(self, attempt: Attempt) -> None:
        try:
            self._pipeline.put(attempt)
        except RuntimeError as error:  # the system starts no more threads
            self._pipeline.end(attempt, error)


def _single_writer(tiers: Tiers) -> Tiers:
    shared = None if tiers.shared is None else SingleWriter(tiers.shared)
    return replace(tiers, near=SingleWriter(tiers.near), shared=shared)
