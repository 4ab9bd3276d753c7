"""N ranks as threads of one process, with the exchange logic of the real ones."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from dscheck.ranks.base import Ranks
from dscheck.ranks.board import BoardLostError
from dscheck.ranks.exchange import BoardRanks

T = TypeVar("T")


class _Keys:
    """What the ranks of one process share."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.counts: dict[str, int] = {}
        self.changed = threading.Condition()
        self.lost = False


class SharedBoard:
    """One rank's end of a board in memory; when the rank that hosts it closes, the board ends for all."""

    def __init__(self, keys: _Keys, hosts: bool) -> None:
        self._keys = keys
        self._hosts = hosts

    @property
    def keys(self) -> set[str]:
        """What is on the board now; nothing, when every rank has acknowledged every round."""
        with self._keys.changed:
            return {*self._keys.values, *self._keys.counts}

    def put(self, key: str, value: bytes, until: float) -> None:
        with self._alive() as keys:
            keys.values[key] = value
            keys.changed.notify_all()

    def put_once(self, key: str, value: bytes, until: float) -> bytes:
        with self._alive() as keys:
            stands = keys.values.setdefault(key, value)
            keys.changed.notify_all()
            return stands

    def add(self, key: str, until: float) -> int:
        with self._alive() as keys:
            keys.counts[key] = keys.counts.get(key, 0) + 1
            return keys.counts[key]

    def wait(self, key: str, until: float) -> bytes | None:
        with self._alive() as keys:
            keys.changed.wait_for(lambda: key in keys.values or keys.lost, max(0.0, until - time.monotonic()))
            self._check()
            return keys.values.get(key)

    def look(self, key: str, until: float) -> bytes | None:
        with self._alive() as keys:
            return keys.values.get(key)

    def read(self, keys: Sequence[str], until: float) -> list[bytes] | None:
        with self._alive() as shared:
            return [shared.values[key] for key in keys] if shared.values.keys() >= set(keys) else None

    def absent(self, keys: Sequence[str], until: float) -> list[str]:
        with self._alive() as shared:
            return [key for key in keys if key not in shared.values]

    def delete(self, keys: Sequence[str], until: float) -> None:
        with self._alive() as shared:
            for key in keys:
                shared.values.pop(key, None)
                shared.counts.pop(key, None)

    def close(self) -> None:
        if self._hosts:
            with self._keys.changed:
                self._keys.lost = True
                self._keys.changed.notify_all()

    @contextlib.contextmanager
    def _alive(self) -> Iterator[_Keys]:
        with self._keys.changed:
            self._check()
            yield self._keys

    def _check(self) -> None:
        if self._keys.lost:
            raise BoardLostError("its board in this process was closed")


def thread_ranks(n: int, linger_s: float = 5.0) -> list[Ranks]:
    """N ranks that share a board in this process: rank i for thread i. Rank 0 closes last, if `linger_s` allows."""
    keys = _Keys()
    return [BoardRanks(rank, n, SharedBoard(keys, hosts=rank == 0), linger_s=linger_s) for rank in range(n)]


def run_ranks(
    n: int, fn: Callable[[Ranks], T], timeout: float = 30.0, ranks: Sequence[Ranks] | None = None
) -> list[T | BaseException]:
    """Run `fn(ranks)` in one thread per rank, and return per rank its result or the exception that it raised.

    A rank that is not done after `timeout` seconds has a TimeoutError in its place; its thread is left behind (daemon).
    The ranks are `thread_ranks(n)`, closed at the end, or the given ones, left open.
    """
    members = thread_ranks(n) if ranks is None else ranks
    outcomes: list[T | BaseException] = [TimeoutError(f"rank {rank} still ran after {timeout} s") for rank in range(n)]

    def run(rank: int) -> None:
        try:
            outcomes[rank] = fn(members[rank])
        except BaseException as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank-{rank}", daemon=True) for rank in range(n)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + timeout
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    if ranks is None:
        for member in reversed(members):
            member.close()
    return list(outcomes)
