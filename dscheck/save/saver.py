"""Saves in the background: one thread takes the attempts of this rank in order through capture, plan, write and
arrival.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
import time
import warnings
from collections.abc import Mapping
from typing import Any

from dscheck.commit import await_record, confirm
from dscheck.config import Settings
from dscheck.errors import (
    DeadlineError,
    DscheckError,
    RankFailureError,
    SaveSkippedError,
    SupersededError,
)
from dscheck.manifest.keys import data_key
from dscheck.ranks.base import Failed, Ok, Ranks
from dscheck.ranks.message import pack, unpack
from dscheck.save.attempt import Agreed, Attempt, Moment, source_of
from dscheck.save.claims import unpack_exceptions
from dscheck.save.coordinator import Coordinator, Lineage, pack_row
from dscheck.save.handle import GRACE_S, SaveHandle
from dscheck.save.write import write_file
from dscheck.snapshot import Arena, Capture, Fences, Lanes
from dscheck.state.leaf import FlatState
from dscheck.storage.base import Storage

log = logging.getLogger("dscheck")

POLL_S = 0.05
"""How often a rank that gives up looks whether its save has ended."""

LAST_LOOK_S = 2.0
"""How long a rank whose deadline has passed looks for the record before it reports failure."""


class Saver:
    """All saves of one Checkpointer on one rank. `save`, `drain` and `close` are for the training thread."""

    def __init__(
        self, storage: Storage, ranks: Ranks, settings: Settings, fences: Fences, versions: Mapping[str, str]
    ) -> None:
        self._storage, self._ranks, self._settings, self._fences = storage, ranks, settings, fences
        self._coordinator = Coordinator(storage, settings, versions)
        self._host = socket.gethostname()
        self._arena, self._lanes = Arena(), Lanes()
        self._agreed, self._sent = Agreed(), ""
        self._queue: queue.SimpleQueue[Attempt | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._calls = 0
        self._current: Attempt | None = None
        self._skips: list[SaveHandle] = []
        self._stop: DscheckError | None = None
        self._confirmed: int | None = None
        self.superseded: SupersededError | None = None

    def continue_from(self, lineage: Lineage) -> None:
        """The next save claims a new term that continues from there. Only between saves."""
        self._coordinator.continue_from(lineage)
        self._confirmed = self.superseded = None

    def refuse(self, step: int, error: Exception) -> None:
        """`save()` fails in the call on this rank: the others learn it, in the background."""
        attempt = self._attempt(step, SaveHandle(step, self._settings.timeout_s))
        attempt.error, attempt.told = error, True
        self._enqueue(attempt)

    def decline(self, step: int, handle: SaveHandle, error: SupersededError) -> SaveHandle:
        """This job lost the root to a newer one: no save of it succeeds any more, which is said at every one (C2)."""
        self.refuse(step, error)
        handle.finish(error)
        warnings.warn(f"dscheck: step {step} is not saved: {error}", RuntimeWarning, stacklevel=3)
        return handle

    def busy(self) -> bool:
        """Whether an earlier save is unfinished on this rank; one that outlived its deadline is for `drain` to end."""
        attempt = self._current
        return attempt is not None and not attempt.handle.done and not _overdue(attempt)

    def save(self, step: int, flat: FlatState, handle: SaveHandle) -> SaveHandle:
        """Take the moment and hand it to the background. The caller has made sure that no save is under way.

        Never raises: what fails here (memory for the region, on the host or the device) fails the save (C8).
        """
        attempt = self._attempt(step, handle)
        try:
            self._take(attempt, flat)
        except Exception as error:
            attempt.error, attempt.capture, attempt.moment = error, None, None
        self._fences.guard(attempt.capture)
        self._enqueue(attempt)
        return handle

    def _take(self, attempt: Attempt, flat: FlatState) -> None:
        self._fences.watch({leaf.owner for leaf in flat.tensors if leaf.owner is not None})
        attempt.moment = moment = Moment.of(flat, self._ranks.rank, self._host, self._fences, self._agreed, self._sent)
        shares = moment.shares(self._ranks.rank, self._agreed.exceptions)
        attempt.captured = {(item.claim.name, box): index for index, (item, box) in enumerate(shares)}
        attempt.capture = Capture(
            [source_of(item, box) for item, box in shares],
            self._arena,
            self._lanes,
            self._fences.steps,
            piece_bytes=self._settings.piece_bytes,
            deadline=attempt.handle.deadline,
            devices={values.device for values in moment.samples.values()},
        )
        attempt.handle.stats.bytes = attempt.capture.nbytes
        attempt.handle.stats.stall_s["host_memory"] = self._arena.grow_s

    def skip(self, step: int, handle: SaveHandle) -> SaveHandle:
        """Tell the others that this rank is busy, without waiting for what it is busy with."""
        attempt = Attempt(self._next_call(), step, handle, coordinator=self._coordinator, busy=True)
        self._skips = [skip for skip in self._skips if not skip.done] + [handle]
        threading.Thread(target=self._attend, args=(attempt,), name="dscheck-skip", daemon=True).start()
        return handle

    def drain(self) -> None:
        """Return when no save is under way on this rank. One that outlived its deadline is given up, with its
        thread.
        """
        attempt = self._current
        if attempt is None or attempt.handle.done:
            return
        patience = max(0.0, attempt.handle.deadline - time.monotonic()) + GRACE_S
        if not attempt.handle.join(patience):
            self._abandon(attempt)

    def close(self, *, abort: bool) -> None:
        """End the background. `abort` tells the other ranks instead of waiting for the save under way."""
        if abort:
            self._leave(RankFailureError("training ended by an exception", ranks=[self._ranks.rank], phase="training"))
        else:
            self.drain()
            for skip in self._skips:
                skip.join(max(0.0, skip.deadline - time.monotonic()) + GRACE_S)
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(GRACE_S)

    def _leave(self, reason: DscheckError) -> None:
        """Give up the save under way, and let no rank wait for this one, neither there nor in the save to come."""
        self._stop = reason
        attempt = self._current
        if attempt is not None and (capture := attempt.capture) is not None:
            capture.fail(reason)
        with contextlib.suppress(DscheckError):
            self._ranks.exchange(
                f"save-{self._next_call()}/plan",
                Failed(str(reason)),
                self._coordinator.decide_plan,
                deadline=time.monotonic() + GRACE_S,
                phase="the next save",
            )
        if attempt is not None:
            self._end_round_of(attempt)

    def _end_round_of(self, attempt: Attempt) -> None:
        """Return when the attempt has ended. While it writes it sees `_stop` by itself; in a round it would wait."""
        until, exchanging = time.monotonic() + GRACE_S, False
        while not attempt.handle.join(POLL_S) and time.monotonic() < until:
            # Seen twice: it has arrived by now, so that closing fails its round for all.
            if exchanging and attempt.exchanging:
                self._ranks.close()
            exchanging = attempt.exchanging

    def _next_call(self) -> int:
        self._calls += 1
        return self._calls

    def _attempt(self, step: int, handle: SaveHandle) -> Attempt:
        self._current = Attempt(self._next_call(), step, handle, coordinator=self._coordinator)
        return self._current

    def _enqueue(self, attempt: Attempt) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._queue = queue.SimpleQueue()
            self._thread = threading.Thread(target=self._work, args=(self._queue,), name="dscheck-save", daemon=True)
            self._thread.start()
        self._queue.put(attempt)

    def _abandon(self, attempt: Attempt) -> None:
        """The thread hangs in a call that knows no deadline: leave it, with the memory it may still touch."""
        self._queue.put(None)  # it ends when it wakes
        self._arena, self._lanes, self._thread, self._sent = Arena(), Lanes(), None, ""
        self._coordinator = self._coordinator.successor()
        self._end(
            attempt,
            DeadlineError(
                f"step {attempt.step}: the save did not end by its deadline; its thread hangs in {self._storage.url}",
                ranks=[self._ranks.rank],
                phase="save",
                waited_for=self._storage.url,
            ),
        )

    def _work(self, attempts: queue.SimpleQueue[Attempt | None]) -> None:
        while (attempt := attempts.get()) is not None:
            self._attend(attempt)

    def _attend(self, attempt: Attempt) -> None:
        """One attempt from beginning to end. Nothing escapes: it shows on the handle and in a warning (C8)."""
        try:
            self._run(attempt)
        except Exception as error:
            self._end(attempt, error)
        else:
            self._end(attempt, None)

    def _end(self, attempt: Attempt, error: Exception | None) -> None:
        if attempt.handle.done:
            return  # given up before, or declined
        if attempt is self._current:
            self._fences.guard(None)
        if attempt.capture is not None:
            attempt.handle.stats.stall_s["fence"] += attempt.capture.fence_s
        attempt.capture = attempt.moment = None
        if isinstance(error, SupersededError):
            self.superseded = error
        if error is not None and not isinstance(error, SaveSkippedError):
            self._sent = ""  # rank 0 may have lost what this rank sent
        attempt.handle.finish(error)
        if error is not None and not attempt.told and not isinstance(error, SaveSkippedError):
            log.error("save of step %d failed: %s", attempt.step, error)
            with contextlib.suppress(RuntimeWarning):  # raised where warnings are errors: this thread must live
                warnings.warn(f"dscheck: the save of step {attempt.step} failed: {error}", RuntimeWarning, stacklevel=1)

    def _run(self, attempt: Attempt) -> None:
        try:
            if attempt.error is not None:
                raise attempt.error
            if not attempt.busy:
                self._capture(attempt)
            answer = self._plan(attempt)
            self._write_and_arrive(attempt, answer)
        except Exception as error:
            self._tell(attempt, error)
            raise

    def _capture(self, attempt: Attempt) -> None:
        assert attempt.capture is not None
        attempt.capture.run()
        assert attempt.moment is not None
        if not attempt.moment.full:
            attempt.handle.captured()
        self._check_stop()

    def _plan(self, attempt: Attempt) -> dict[str, Any]:
        """First round: what this rank holds against the plan, the term and the attempt that it belongs to."""
        moment = attempt.moment
        post: dict[str, Any] = {"step": attempt.step, "busy": attempt.busy}
        if moment is not None:
            post |= {
                "digest": moment.digest,
                "claims": moment.text.decode() if moment.full else None,
                "plan": self._agreed.plan,
                "full": moment.full,
                "samples": moment.hashes(),
            }
        answer = self._exchange(attempt, "plan", Ok(pack(post)))
        if answer["skip"]:
            raise SaveSkippedError(f"step {attempt.step} was skipped: a rank was busy with an earlier save")
        if moment is None or attempt.handle.done:
            raise DscheckError(f"step {attempt.step}: this save was given up at its deadline")
        attempt.planned = True
        self._sent = moment.digest
        if "exceptions" in answer:
            exceptions = unpack_exceptions(answer["exceptions"])
            self._agreed = Agreed(answer["plan"], exceptions, frozenset(unpack_exceptions(answer["contested"])))
        return answer

    def _write_and_arrive(self, attempt: Attempt, answer: Mapping[str, Any]) -> None:
        term = answer["term"]
        if self._confirmed != term:
            confirm(self._storage, term, answer["term_id"])
            self._confirmed = term
        assert attempt.moment is not None
        rank = self._ranks.rank
        fragments = attempt.fragments(attempt.moment.shares(rank, self._agreed.exceptions))
        attempt.handle.captured()
        row = write_file(
            self._storage,
            data_key(attempt.step, term, rank),
            rank,
            fragments,
            attempt.moment.objects,
            self._settings.block_bytes,
            lambda: self._check(attempt),
        )
        attempt.handle.stats.written_s = time.monotonic() - attempt.handle.began
        try:
            self._exchange(attempt, "arrive", Ok(pack_row(row)))
        except (DeadlineError, RankFailureError) as error:
            if not self._committed_anyhow(attempt.step, term, answer["id"], error):
                raise

    def _committed_anyhow(self, step: int, term: int, id: str, error: DscheckError) -> bool:
        """The coordinator may have committed and died, or been too slow to say so: the record knows (C7)."""
        # Past the deadline it may be in the middle of it; when a rank has failed it is not.
        until = time.monotonic() + (LAST_LOOK_S if isinstance(error, DeadlineError) else 0.0)
        try:
            return await_record(self._storage, step, term, id, deadline=until)
        except DscheckError as error:
            log.warning("step %d: the record could not be read either: %s", step, error)
            return False

    def _exchange(self, attempt: Attempt, phase: str, mine: Ok | Failed) -> dict[str, Any]:
        attempt.joined.append(phase)
        attempt.exchanging = True
        assert attempt.coordinator is not None
        decide = attempt.coordinator.decide_plan if phase == "plan" else attempt.coordinator.decide_arrive
        try:
            answer = self._ranks.exchange(
                f"save-{attempt.number}/{phase}",
                mine,
                decide,
                deadline=attempt.handle.deadline,
                phase=f"{phase} of step {attempt.step}",
            )
        finally:
            attempt.exchanging = False
        decoded: dict[str, Any] = unpack(answer)
        return decoded

    def _tell(self, attempt: Attempt, error: Exception) -> None:
        """Let no rank wait for this one: its failure ends the round that they are in, or come to."""
        phase = attempt.untold
        if phase is not None:
            with contextlib.suppress(DscheckError):
                self._exchange(attempt, phase, Failed(f"{type(error).__name__}: {error}"))

    def _check_stop(self) -> None:
        if self._stop is not None:
            raise self._stop

    def _check(self, attempt: Attempt) -> None:
        self._check_stop()
        if time.monotonic() > attempt.handle.deadline:
            raise DeadlineError(
                f"step {attempt.step}: rank {self._ranks.rank} did not write its data in time",
                ranks=[self._ranks.rank],
                phase="write",
                waited_for=self._storage.url,
            )


def _overdue(attempt: Attempt) -> bool:
    return time.monotonic() > attempt.handle.deadline + GRACE_S
