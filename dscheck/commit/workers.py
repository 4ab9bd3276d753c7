"""Work side by side on threads that nobody has to wait for: a call of a storage that hangs must not hang its caller."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

Stop = Callable[[], None]
"""Called again and again by work that takes long; it raises when that is to end."""

POLL_S = 0.2

LEAVE_S = 5.0
"""How long to wait for threads that were told to end. One that comes back from native code while the interpreter ends
would end the process by an abort.
"""


class _LeftError(Exception):
    """Nobody waits for this work any more."""


def side_by_side(jobs: Iterable[Callable[[Stop], None]], threads: int, stop: Stop, name: str) -> None:
    """All of `jobs` have returned. The first error of one is raised, or what `stop` raises, which is called meanwhile.

    Then no further job begins; what those that run are given raises. One that hangs is left behind.
    """
    waiting: queue.SimpleQueue[Callable[[Stop], None]] = queue.SimpleQueue()
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    gone = threading.Event()
    count = 0
    for job in jobs:
        waiting.put(job)
        count += 1

    def stop_or_left() -> None:
        if gone.is_set():
            raise _LeftError
        stop()

    def work() -> None:
        while not gone.is_set():
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                job(stop_or_left)
            except BaseException as error:
                ended.put(error)
            else:
                ended.put(None)

    workers = [_started(work, f"{name}-{number}") for number in range(min(threads, count))]
    try:
        for _ in range(count):
            error = _next(ended, stop)
            if error is not None:
                raise error
    finally:
        gone.set()
        _leave(workers)


def ahead(items: Iterator[T], name: str) -> Iterator[T]:
    """The same items, each made on a thread while the one before it is used. At most three are there at a time."""
    made: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(1)
    gone = threading.Event()

    def put(item: T | None, error: BaseException | None) -> None:
        while not gone.is_set():
            with contextlib.suppress(queue.Full):
                made.put((item, error), timeout=POLL_S)
                return

    def work() -> None:
        try:
            for item in items:
                put(item, None)
                if gone.is_set():
                    return
        except BaseException as error:
            put(None, error)
        else:
            put(None, StopIteration())

    worker = _started(work, name)
    try:
        while True:
            item, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            assert item is not None
            yield item
    finally:
        gone.set()
        _leave([worker])


def _started(work: Callable[[], None], name: str) -> threading.Thread:
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    return thread


def _leave(workers: Iterable[threading.Thread]) -> None:
    until = time.monotonic() + LEAVE_S
    for worker in workers:
        worker.join(max(0.0, until - time.monotonic()))


def _next(ended: queue.SimpleQueue[BaseException | None], stop: Stop) -> BaseException | None:
    while True:
        stop()
        try:
            return ended.get(timeout=POLL_S)
        except queue.Empty:
            continue
