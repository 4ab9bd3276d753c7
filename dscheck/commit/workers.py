"""Work side by side on threads that nobody has to wait for: a call of a storage that hangs must not hang its caller."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

POLL_S = 0.2


def side_by_side(jobs: Iterable[Callable[[], None]], threads: int, stop: Callable[[], None], name: str) -> None:
    """All of `jobs` have returned. The first error of one is raised, or what `stop` raises, which is called meanwhile.

    Then no further job begins; those that run are left behind and should look at `stop` themselves.
    """
    waiting: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    gone = threading.Event()
    count = 0
    for job in jobs:
        waiting.put(job)
        count += 1

    def work() -> None:
        while not gone.is_set():
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                job()
            except BaseException as error:
                ended.put(error)
            else:
                ended.put(None)

    for number in range(min(threads, count)):
        threading.Thread(target=work, name=f"{name}-{number}", daemon=True).start()
    try:
        for _ in range(count):
            error = _next(ended, stop)
            if error is not None:
                raise error
    finally:
        gone.set()


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

    threading.Thread(target=work, name=name, daemon=True).start()
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


def _next(ended: queue.SimpleQueue[BaseException | None], stop: Callable[[], None]) -> BaseException | None:
    while True:
        stop()
        try:
            return ended.get(timeout=POLL_S)
        except queue.Empty:
            continue
