"""From the near tier to the shared one, in the background: each rank its files, then the record, by rank 0 (P32)."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from dscheck.commit import StepRef
from dscheck.commit.blocks import stored_blocks
from dscheck.commit.contents import Contents
from dscheck.commit.term import read_term
from dscheck.commit.tiered import Node
from dscheck.commit.transfer import copy_file, finish
from dscheck.commit.workers import side_by_side
from dscheck.config import Settings
from dscheck.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    DeadlineError,
    DscheckError,
    SupersededError,
)
from dscheck.manifest.keys import attempt_prefix, record_key
from dscheck.manifest.record import Record, decode_record
from dscheck.ranks.base import Failed, Ok, Ranks
from dscheck.ranks.message import pack, unpack
from dscheck.save.handle import GRACE_S, SaveHandle
from dscheck.save.pending import Pending, assign
from dscheck.save.retainer import Retainer
from dscheck.storage import Tiers
from dscheck.storage.base import Storage

log = logging.getLogger("dscheck")

T = TypeVar("T")

LOST = (CorruptCheckpointError, CheckpointNotFoundError)
"""What the near tier raises for a step that will never be uploaded from there."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One time that the ranks see what is to be uploaded, all in the same order: after each save, and before a first.

    `handle`: of that save, which is waited for; `limit`: the highest step, so that a later one, which may be committed
    by then, keeps its own turn; `number` counts them.
    """

    number: int
    handle: SaveHandle | None
    limit: int


class Uploads:
    """The thread `dscheck-upload` of one rank. Nothing that fails here reaches training but by a warning (C8)."""

    def __init__(
        self,
        tiers: Tiers,
        shared: Storage,
        ranks: Ranks,
        settings: Settings,
        retainers: Sequence[Retainer],
        superseded: Callable[[SupersededError], None],
    ) -> None:
        """`retainers`: of the near and the shared tier, to be woken when nothing waits for its upload any more.
        `superseded` is told when a newer job has the shared tier.
        """
        self._near, self._shared, self._node_local = tiers.near, shared, tiers.node_local
        self._ranks, self._settings, self._superseded = ranks, settings, superseded
        self._pending, self._retainers = Pending(tiers, shared), retainers
        self._turns: queue.SimpleQueue[Turn | None] = queue.SimpleQueue()
        self._handles: dict[int, SaveHandle] = {}
        self._uploaded: list[Record] = []
        """What retention has not heard of yet."""
        self._failed: dict[int, Exception] = {}
        """By number, the turns that no save waits for."""
        self._put = self._ended = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._reason: DscheckError | None = None
        self._deadline, self._process = 0.0, os.getpid()

    def put(self, handle: SaveHandle | None, limit: int) -> Callable[[], None]:
        """Take a turn after all that were put before. Returns what waits for those that come before this one."""
        turn = Turn(self._put, handle, limit)
        self._put += 1
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="dscheck-upload", daemon=True)
            self._thread.start()
            atexit.register(self._end_with_process)
        self._turns.put(turn)
        return partial(self._await, turn.number, handle)

    def now(self, limit: int) -> None:
        """What waits, up to step `limit`, has been uploaded when this returns; raises why not. On all ranks alike."""
        number = self._put
        self.put(None, limit)
        with self._changed:
            if not self._changed.wait_for(lambda: self._ended > number, self._settings.upload_timeout_s + GRACE_S):
                raise DeadlineError(
                    f"the upload of step {limit} to {self._shared.url} did not end in time",
                    ranks=[self._ranks.rank],
                    phase="upload",
                    waited_for=self._shared.url,
                )
        if number in self._failed:
            raise self._failed[number]

    def close(self, *, abort: bool) -> None:
        """Let the thread end: when all turns are through, or at once, and then no rank waits in a turn for this one."""
        if abort:
            self._reason = DscheckError("training ended by an exception")
        if self._thread is None:
            self._refuse(self._put)
            return
        self._turns.put(None)
        atexit.unregister(self._end_with_process)
        left = self._put - self._ended
        self._thread.join(GRACE_S if abort else left * (self._settings.upload_timeout_s + GRACE_S))
        self._retainers[0].close(GRACE_S)

    def _await(self, number: int, handle: SaveHandle | None) -> None:
        """Return when all turns before this one have ended, or half of what the save has left in time has passed."""
        left_s = 0.0 if handle is None else max(0.0, handle.deadline - time.monotonic())
        with self._changed:
            self._changed.wait_for(lambda: self._ended >= number, left_s / 2)

    def _end_with_process(self) -> None:
        if os.getpid() == self._process:
            self.close(abort=getattr(sys, "last_value", None) is not None)

    def _work(self) -> None:
        while (turn := self._turns.get()) is not None:
            try:
                if self._reason is not None:
                    self._refuse(turn.number)
                    raise self._reason
                self._attend(turn)
            except BaseException as failure:
                error = failure if isinstance(failure, Exception) else DscheckError(f"an upload broke off: {failure!r}")
                self._tell(turn, error)
            with self._changed:
                self._ended += 1
                self._changed.notify_all()
        self._refuse(self._put)

    def _refuse(self, number: int) -> None:
        """Where this rank gives up, let the others see it in that turn."""
        if self._reason is not None:
            self._deadline = time.monotonic() + GRACE_S
            with contextlib.suppress(DscheckError):
                self._exchange(number, "begin", Failed(str(self._reason)), _nothing)

    def _attend(self, turn: Turn) -> None:
        handle = turn.handle
        if handle is not None:
            handle.join(max(0.0, handle.deadline - time.monotonic()) + GRACE_S)
            if handle.error is None:
                self._handles[handle.step] = handle
        self._deadline = time.monotonic() + self._settings.upload_timeout_s
        saved = handle.step if handle is not None and handle.done and handle.error is None else None
        node = f"{socket.gethostname()}:{self._near.url}" if self._node_local else ""
        post = {"saved": saved, "near": self._look(), "node": node}
        answer = self._exchange(turn.number, "begin", pack(post), lambda posts: self._begin(posts, turn.limit))
        firsts, number = answer["firsts"], 0
        while answer["record"] is not None:
            answer = self._upload_one(turn, number, answer)
            number += 1
        if handle is not None and self._put == turn.number + 1:  # no later step waits
            self._retain(firsts)

    def _retain(self, firsts: Sequence[int]) -> None:
        """One rank of each node sees to its near tier, rank 0 to the shared one."""
        uploaded, self._uploaded = self._uploaded, []
        mine = [*self._retainers[: self._ranks.rank in firsts], *self._retainers[1:][: self._ranks.rank == 0]]
        if not (mine and uploaded):
            return
        number = uploaded[-1].term
        term = self._aside(lambda: read_term(self._near, number))
        for retainer in mine:
            for record in uploaded:
                if record.term == number:
                    retainer.wake(term, record)

    def _begin(self, posts: Sequence[bytes], limit: int) -> bytes:
        return self._aside(lambda: self._pending.begin(posts, limit))

    def _look(self) -> str | None:
        return self._aside(lambda: Node.look(self._near).encode().decode()) if self._node_local else None

    def _upload_one(self, turn: Turn, number: int, answer: dict[str, Any]) -> dict[str, Any]:
        """One step: this rank's part of the files, then the round in which rank 0 publishes the record up there."""
        step = answer["step"]
        record = decode_record(answer["record"].encode(), record_key(step, answer["term"]))
        assert isinstance(record, Record)
        moved: list[int] = []
        lost = None
        try:
            contents = self._aside(lambda: Contents.open(self._near, record))
            files = [self._ranks.rank] if answer["own"] else self._assigned(turn, number, contents)
            self._copy(contents, files, moved)
        except LOST as error:
            lost = f"{type(error).__name__}: {error}"
        except Exception as error:
            with contextlib.suppress(DscheckError):
                self._exchange(turn.number, f"done-{number}", Failed(f"{type(error).__name__}: {error}"), _nothing)
            raise
        post = pack({"lost": lost})
        answer = self._exchange(turn.number, f"done-{number}", post, lambda posts: self._done(posts, record))
        if answer["lost"] is not None:
            damage = CorruptCheckpointError(answer["lost"], step=step)
            self._warn(f"step {step} stays in the near tier alone, and is not uploaded: {damage}")
            self._settle(step, damage, 0)
        else:
            self._uploaded.append(record)
            self._settle(step, None, sum(moved))
        return answer

    def _assigned(self, turn: Turn, number: int, contents: Contents) -> list[int]:
        """The files that this rank uploads of a step that other processes wrote: some of those that it can see."""
        prefix = attempt_prefix(contents.record.step, contents.record.term)
        found = self._aside(lambda: {entry.key: entry.size for entry in self._near.list(prefix)})
        held = [row.rank for row in contents.files if found.get(contents.key(row.rank)) == row.size]
        count = len(contents.files)
        answer = self._exchange(turn.number, f"files-{number}", pack(held), lambda posts: assign(posts, count))
        mine: list[int] = answer["files"][self._ranks.rank]
        if answer["missing"]:
            key = contents.key(answer["missing"][0])
            raise CheckpointNotFoundError(f"no rank finds {key} whole in the near tier {self._near.url}", key=key)
        return mine

    def _copy(self, contents: Contents, files: Sequence[int], moved: list[int]) -> None:
        blocks = self._aside(lambda: stored_blocks(contents, files))
        jobs = [partial(copy_file, contents, rank, blocks[rank], self._shared, moved.append) for rank in files]
        side_by_side(jobs, self._settings.io_threads, self._check, "dscheck-upload-file")

    def _done(self, posts: Sequence[bytes], record: Record) -> bytes:
        lost = next((post["lost"] for post in map(unpack, posts) if post["lost"] is not None), None)
        if lost is None:
            try:
                self._aside(lambda: finish(Contents.open(self._near, record), self._shared))
            except LOST as error:
                lost = f"{type(error).__name__}: {error}"
        return self._aside(lambda: self._pending.done(StepRef(record.step, record.term), lost))

    def _aside(self, job: Callable[[], T]) -> T:
        """What `job` returns, by the deadline: it calls a storage, which may hang."""
        found: list[T] = []
        side_by_side([lambda _: found.append(job())], 1, self._check, "dscheck-upload-aside")
        return found[0]

    def _check(self) -> None:
        if self._reason is not None:
            raise self._reason
        if time.monotonic() > self._deadline:
            raise DeadlineError(
                f"rank {self._ranks.rank} did not end its part of an upload to {self._shared.url} within "
                f"{self._settings.upload_timeout_s:g} s; the next save tries again, or raise upload_timeout_s",
                ranks=[self._ranks.rank],
                phase="upload",
                waited_for=self._shared.url,
            )

    def _exchange(
        self, turn: int, phase: str, mine: bytes | Failed, decide: Callable[[Sequence[bytes]], bytes]
    ) -> dict[str, Any]:
        answer = self._ranks.exchange(
            f"upload-{turn}/{phase}",
            mine if isinstance(mine, Failed) else Ok(mine),
            decide,
            deadline=self._deadline,
            phase=f"upload ({phase})",
        )
        decoded: dict[str, Any] = unpack(answer)
        return decoded

    def _settle(self, step: int, error: Exception | None, nbytes: int) -> None:
        handle = self._handles.pop(step, None)
        if handle is not None:
            handle.uploaded(error, nbytes)

    def _tell(self, turn: Turn, error: Exception) -> None:
        """A turn failed: what it was to upload waits in the near tier for the next one."""
        if turn.handle is None:
            self._failed[turn.number] = error
        if isinstance(error, SupersededError):
            self._superseded(error)
        for handle in self._handles.values():
            handle.uploaded(error, 0)
        if self._reason is None:
            log.error("upload to %s failed: %s", self._shared.url, error)
            self._warn(f"an upload to {self._shared.url} failed, and is tried again with the next save: {error}")

    def _warn(self, what: str) -> None:
        with contextlib.suppress(RuntimeWarning):  # raised where warnings are errors: this thread must live
            warnings.warn(f"dscheck: {what}", RuntimeWarning, stacklevel=2)


def _nothing(posts: Sequence[bytes]) -> bytes:
    return pack({})
