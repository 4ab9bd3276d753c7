"""The one exchange logic: N ranks over a board, rank 0 deciding, whatever the medium.

Every round ends by one key, its answer, which is set once: by rank 0 when it has decided, by a rank that failed, or by
a rank whose deadline passed. Whoever comes second finds the first one's answer and takes it. So all ranks leave a round
with the same outcome, a failure is seen without waiting for anybody, and rank 0 need not be there for it.

Every rank posts to rank 0. A leader per node (gather, post one joined payload, pass the answer on) fits behind
`exchange` without a caller seeing it: the answer key and its rule stay as they are.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dscheck.errors import ConfigError, DeadlineError, DscheckError, RankFailureError
from dscheck.ranks.base import Failed, Ok
from dscheck.ranks.board import Board, BoardLostError, BoardTimeoutError
from dscheck.ranks.wire import open_answer, seal_answer, seal_error

# Rounds that some rank never acknowledged (it died, or is late) and that still keep their full answer.
_KEPT_ROUNDS = 16


@dataclass(frozen=True, slots=True)
class _Round:
    name: str
    phase: str
    size: int
    started: float
    deadline: float

    @property
    def answer(self) -> str:
        return f"{self.name}/answer"

    @property
    def wake(self) -> str:
        return f"{self.name}/wake"

    @property
    def arrived(self) -> str:
        return f"{self.name}/arrived"

    @property
    def acknowledged(self) -> str:
        return f"{self.name}/acknowledged"

    def post(self, rank: int) -> str:
        return f"{self.name}/post-{rank}"

    @property
    def posts(self) -> list[str]:
        return [self.post(rank) for rank in range(self.size)]


class BoardRanks:
    """Ranks over one board, which this object owns and closes."""

    def __init__(self, rank: int, size: int, board: Board, linger_s: float) -> None:
        """`linger_s`: how long `close` on rank 0 keeps the board up for ranks that have not read their last answer."""
        self._rank = rank
        self._size = size
        self._board = board
        self._linger_s = linger_s
        self._kept: deque[_Round] = deque()
        self._open: set[_Round] = set()
        self._lock = threading.Lock()
        self._closed = False

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._size

    def exchange(
        self,
        round: str,
        mine: Ok | Failed,
        decide: Callable[[Sequence[bytes]], bytes],
        *,
        deadline: float,
        phase: str,
    ) -> bytes:
        """As `Ranks.exchange` says; from several threads at once for different rounds.

        A rank that gives up at its deadline ends the round for all: if rank 0 was inside `decide` by then, what that
        did stands, and rank 0 raises the same DeadlineError as the others.
        """
        this = _Round(round, phase, self._size, time.monotonic(), deadline)
        with self._lock:
            if self._closed:
                raise ConfigError(f"{phase}: exchange {round!r} on ranks that are closed")
            self._open.add(this)
        try:
            answer = self._outcome(this, mine, decide)
        except BoardLostError as lost:
            raise _unreachable(this, str(lost)) from lost
        except BoardTimeoutError as late:
            raise _unresponsive(this) from late
        finally:
            with self._lock:
                self._open.discard(this)
        return open_answer(answer)

    def close(self) -> None:
        """Fail the rounds that this rank is still in, for all ranks, and drop the board.

        On rank 0 the board goes only when every rank has read its last answer, or `linger_s` has passed.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            under_way = list(self._open)
        with contextlib.suppress(BoardLostError, BoardTimeoutError):
            for this in under_way:
                until = min(this.deadline, time.monotonic() + self._linger_s)
                self._end(this, seal_error(_failure(this, self._rank, "closed before the round had ended")), until)
                self._board.put(this.wake, b"", until)
            self._linger()
        self._board.close()

    def _outcome(self, this: _Round, mine: Ok | Failed, decide: Callable[[Sequence[bytes]], bytes]) -> bytes:
        if isinstance(mine, Failed):
            answer = self._end(this, seal_error(_failure(this, self._rank, mine.message)))
        elif self._rank == 0:
            answer = self._coordinate(this, mine.payload, decide)
        else:
            self._arrive(this, mine.payload)
            answer = self._board.wait(this.answer, this.deadline) or self._give_up(this)
        self._acknowledge(this)
        return answer

    def _coordinate(self, this: _Round, payload: bytes, decide: Callable[[Sequence[bytes]], bytes]) -> bytes:
        self._arrive(this, b"")  # Others only want to see that rank 0 is there.
        if self._board.wait(this.wake, this.deadline) is None:
            return self._give_up(this)
        others = self._board.read(this.posts[1:], this.deadline)
        ended = self._board.look(this.answer, this.deadline)
        # Nothing is decided in a round that another rank has ended; it may have removed its post already.
        if ended is not None:
            return ended
        assert others is not None, "rank 0 was woken, but posts are missing"
        try:
            answer = seal_answer(decide([payload, *others]))
        except BaseException as error:
            known = error if isinstance(error, DscheckError) else _failure(this, 0, f"{type(error).__name__}: {error}")
            with contextlib.suppress(BoardLostError, BoardTimeoutError):
                self._end(this, seal_error(known))
            self._acknowledge(this)
            raise
        return self._end(this, answer)

    def _arrive(self, this: _Round, payload: bytes) -> None:
        self._board.put(this.post(self._rank), payload, this.deadline)
        if self._board.add(this.arrived, this.deadline) == self._size:
            self._board.put(this.wake, b"", this.deadline)

    def _end(self, this: _Round, answer: bytes, until: float | None = None) -> bytes:
        """Propose `answer`; the one that stands. Rank 0 does not sleep through an end that another rank gave."""
        until = this.deadline if until is None else until
        stands = self._board.put_once(this.answer, answer, until)
        if self._rank != 0:
            self._board.put(this.wake, b"", until)
        return stands

    def _give_up(self, this: _Round) -> bytes:
        absent = set(self._board.absent(this.posts, this.deadline))
        ranks = tuple(rank for rank in range(self._size) if this.post(rank) in absent)
        return self._end(this, seal_error(_too_late(this, ranks)))

    def _acknowledge(self, this: _Round) -> None:
        """Remove what this rank put on the board; the last one to come removes the rest."""
        # The answer is in hand: a board that breaks now takes nothing from it.
        with contextlib.suppress(BoardLostError, BoardTimeoutError):
            until = max(this.deadline, time.monotonic())
            self._board.delete([this.post(self._rank)], until)
            if self._board.add(this.acknowledged, until) == self._size:
                self._board.delete([this.answer, this.wake, this.arrived, this.acknowledged], until)
            elif self._rank == 0:
                self._keep(this, until)

    def _keep(self, this: _Round, until: float) -> None:
        """Remember a round that others have still to read, and forget the oldest that never was by all."""
        with self._lock:
            self._kept.append(this)
            old = self._kept.popleft() if len(self._kept) > _KEPT_ROUNDS else None
        if old is None or self._board.absent([old.answer], until):
            return
        self._board.delete([old.answer, old.arrived, old.acknowledged, *old.posts], until)
        # A rank that still comes must find an end, not wait for its deadline.
        self._board.put(old.answer, seal_error(_over(old)), until)

    def _linger(self) -> None:
        """Return when nobody needs the board of this rank any more, or after `linger_s`."""
        until, pause_s = time.monotonic() + self._linger_s, 0.001
        while time.monotonic() < until and (self._open or not self._all_read(until)):
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.02)

    def _all_read(self, until: float) -> bool:
        with self._lock:
            answers = [round.answer for round in self._kept]
        return len(self._board.absent(answers, until)) == len(answers)


def _failure(this: _Round, rank: int, message: str) -> RankFailureError:
    return RankFailureError(
        f"{this.phase}: rank {rank} failed: {message}",
        ranks=(rank,),
        phase=this.phase,
        round=this.name,
        messages=(message,),
    )


def _too_late(this: _Round, absent: tuple[int, ...]) -> DeadlineError:
    waited_s = this.deadline - this.started
    if absent:
        waited_for = f"{len(absent)} of {this.size} ranks to arrive: {', '.join(map(str, absent))}"
    else:
        waited_for = f"the answer of rank 0, with all {this.size} ranks there"
    return DeadlineError(
        f"{this.phase}: waited {waited_s:.1f} s in round {this.name!r} for {waited_for}; look at why those ranks are "
        "late or dead, or raise timeout_s",
        ranks=absent or (0,),
        phase=this.phase,
        round=this.name,
        waited_for=waited_for,
    )


def _unreachable(this: _Round, reason: str) -> RankFailureError:
    message = f"rank 0 cannot be reached: {reason}"
    return RankFailureError(
        f"{this.phase}: {message}; it has died or closed, see its log (round {this.name!r})",
        ranks=(0,),
        phase=this.phase,
        round=this.name,
        messages=(message,),
    )


def _unresponsive(this: _Round) -> DeadlineError:
    waited_for = "the store that rank 0 hosts"
    return DeadlineError(
        f"{this.phase}: {waited_for} neither answered nor failed by the deadline of round {this.name!r}; rank 0 is "
        "stopped, or the network to its host is down",
        ranks=(0,),
        phase=this.phase,
        round=this.name,
        waited_for=waited_for,
    )


def _over(this: _Round) -> RankFailureError:
    message = f"round {this.name!r} ended more than {_KEPT_ROUNDS} rounds ago; this rank came too late for its answer"
    return RankFailureError(
        f"{this.phase}: {message}", ranks=(), phase=this.phase, round=this.name, messages=(message,)
    )
