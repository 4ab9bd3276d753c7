"""Faults as wrappers around a storage, in the way of chained transports.

    storage = Faulty(MemoryStorage(), fail_at("commit", "steps/*", error=errno.EIO), slow(0.01, "read"))

A fault is any callable `fault(operation, proceed)`: it may raise, wait, call `proceed` with the operation, or with a
part of its bytes. The first fault is the outermost. One fault may serve the storages of several ranks: it counts over
all of them. Every operation passes, those of the writers included, and stands in `Faulty.log`.
"""

from __future__ import annotations

import errno as errnos
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, cast

from dscheck.errors import StorageError
from dscheck.storage.base import Entry, ObjectWriter, Storage

if TYPE_CHECKING:
    from typing_extensions import Buffer

Lands = Literal["none", "half", "all"]
Proceed = Callable[["Operation"], Any]
Fault = Callable[["Operation", Proceed], Any]

# `abort` is not among them: it frees what no reader sees.
MUTATING = frozenset({"put_if_absent", "create", "write", "commit", "delete"})
ALL = MUTATING | {"read", "read_into", "list"}


class Crash(Exception):
    """The process is dead from here on: nothing it tries with its storage has any effect."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One call of a storage or of a writer. `offset` is the position in the object, for writes, commit and the reads.

    Only a write carries its bytes; a fault that hands on fewer has as many arrive.
    """

    name: str
    key: str
    offset: int = 0
    nbytes: int = 0
    data: bytes | memoryview = field(default=b"", repr=False)


class Faulty:
    """A Storage that hands every operation through `faults` before the wrapped one gets it."""

    def __init__(self, storage: Storage, *faults: Fault) -> None:
        self._storage = storage
        self._faults = faults
        self.log: list[Operation] = []

    @property
    def url(self) -> str:
        return self._storage.url

    def count(self, name: str = "*", key: str = "*") -> int:
        """How many operations of that name and key (shell patterns; `*` crosses slashes) were tried so far."""
        return sum(fnmatchcase(op.name, name) and fnmatchcase(op.key, key) for op in self.log)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        operation = Operation("put_if_absent", key, nbytes=len(data))
        return cast(bool, self._run(operation, lambda op: self._storage.put_if_absent(key, data)))

    def create(self, key: str) -> ObjectWriter:
        writer = self._run(Operation("create", key), lambda op: self._storage.create(key))
        return _FaultyWriter(self._run, key, writer)

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        operation = Operation("read", key, offset, nbytes=length or 0)
        return cast(bytes, self._run(operation, lambda op: self._storage.read(key, offset, length)))

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        operation = Operation("read_into", key, offset, nbytes=buffer.nbytes)
        self._run(operation, lambda op: self._storage.read_into(key, offset, buffer))

    def list(self, prefix: str) -> Iterator[Entry]:
        return iter(self._run(Operation("list", prefix), lambda op: tuple(self._storage.list(prefix))))

    def delete(self, key: str) -> None:
        self._run(Operation("delete", key), lambda op: self._storage.delete(key))

    def _run(self, operation: Operation, proceed: Proceed) -> Any:
        self.log.append(replace(operation, data=b""))
        for fault in reversed(self._faults):
            proceed = _bind(fault, proceed)
        return proceed(operation)


class _FaultyWriter:
    """A writer whose operations pass the faults too; what failed once stays failed."""

    def __init__(self, run: Callable[[Operation, Proceed], Any], key: str, writer: ObjectWriter) -> None:
        self._run, self._key, self._writer = run, key, writer
        self._size = 0
        self._failed = False

    def write(self, data: Buffer) -> None:
        view = memoryview(data)
        view = view.cast("B") if view.nbytes else memoryview(b"")
        operation = Operation("write", self._key, self._size, view.nbytes, view)
        self._step(operation, lambda op: self._writer.write(op.data))
        self._size += view.nbytes

    def commit(self) -> int:
        return cast(int, self._step(Operation("commit", self._key, self._size), lambda op: self._writer.commit()))

    def abort(self) -> None:
        try:
            self._run(Operation("abort", self._key, self._size), lambda op: self._writer.abort())
        except Exception:
            # An abort never raises, and one of a crashed process does nothing.
            return

    def _step(self, operation: Operation, proceed: Proceed) -> Any:
        if self._failed:
            raise StorageError(f"cannot {operation.name} '{self._key}': it failed before", key=self._key)
        self._failed = True
        result = self._run(operation, proceed)
        self._failed = False
        return result


def _bind(fault: Fault, proceed: Proceed) -> Proceed:
    return lambda operation: fault(operation, proceed)


@dataclass(slots=True)
class _Match:
    """Says of each operation whether a fault means it: those of that name and key from the nth on, `times` of them."""

    name: str
    key: str
    nth: int = 1
    times: int | None = 1
    seen: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, operation: Operation) -> bool:
        if not (fnmatchcase(operation.name, self.name) and fnmatchcase(operation.key, self.key)):
            return False
        with self.lock:
            self.seen += 1
            return self.nth <= self.seen and (self.times is None or self.seen < self.nth + self.times)


def fail_at(
    op: str,
    key: str = "*",
    *,
    nth: int = 1,
    times: int | None = 1,
    error: int | Exception = errnos.EIO,
    lands: Lands = "none",
) -> Fault:
    """The nth operation `op` on a key like `key` raises `error`, an exception or the errno of a StorageError.

    `times` operations fail in all, None for ever. `lands` says how much of it takes effect before: "half" is of a
    write's bytes, and nothing of any other operation.
    """
    match = _Match(op, key, nth, times)

    def fault(operation: Operation, proceed: Proceed) -> Any:
        if not match(operation):
            return proceed(operation)
        _land(operation, proceed, lands)
        if isinstance(error, int):
            reason = os.strerror(error)
            message = f"cannot {operation.name} '{operation.key}': {reason} (injected)"
            raise StorageError(message, key=operation.key) from OSError(error, reason)
        raise error

    return fault


def lost_answer(key: str = "*", op: str = "put_if_absent", *, nth: int = 1, times: int | None = 1) -> Fault:
    """The operation takes effect, and its caller gets an error all the same."""
    return fail_at(op, key, nth=nth, times=times, error=errnos.ETIMEDOUT, lands="all")


def crash_after(k: int, *, lands: Lands = "none", counted: frozenset[str] = MUTATING) -> CrashAfter:
    """After `k` operations of the `counted` kinds the next one, and everything from then on, raises Crash.

    `lands` says how much of that next one still takes effect ("half" is of a write's bytes).
    `fault.crashed` is an Event.
    """
    return CrashAfter(k, lands, counted)


@dataclass(slots=True)
class CrashAfter:
    """The fault that `crash_after` makes."""

    k: int
    lands: Lands
    counted: frozenset[str]
    crashed: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, operation: Operation, proceed: Proceed) -> Any:
        with self.lock:
            if self.crashed.is_set():
                raise Crash(f"crashed before {operation.name} '{operation.key}'")
            if operation.name not in self.counted or self.k > 0:
                self.k -= operation.name in self.counted
                alive = True
            else:
                self.crashed.set()
                alive = False
        if alive:
            return proceed(operation)
        _land(operation, proceed, self.lands)
        raise Crash(f"crashed in {operation.name} '{operation.key}'")


def slow(seconds: float, op: str = "*", key: str = "*") -> Fault:
    """Every such operation takes `seconds` longer."""
    return before(lambda operation: time.sleep(seconds), op, key, times=None)


def hang(until: threading.Event, op: str, key: str = "*", *, nth: int = 1, limit_s: float = 60.0) -> Fault:
    """The nth such operation waits for `until`; TimeoutError after `limit_s`, so that a test that forgets it ends."""

    def wait(operation: Operation) -> None:
        if not until.wait(limit_s):
            raise TimeoutError(f"{operation.name} '{operation.key}' was not let go within {limit_s} s")

    return before(wait, op, key, nth=nth)


def before(
    callback: Callable[[Operation], object], op: str, key: str = "*", *, nth: int = 1, times: int | None = 1
) -> Fault:
    """`callback` runs before such an operation; what it raises comes in the operation's place."""
    match = _Match(op, key, nth, times)

    def fault(operation: Operation, proceed: Proceed) -> Any:
        if match(operation):
            callback(operation)
        return proceed(operation)

    return fault


def after(
    callback: Callable[[Operation], object], op: str, key: str = "*", *, nth: int = 1, times: int | None = 1
) -> Fault:
    """`callback` runs when such an operation has taken effect."""
    match = _Match(op, key, nth, times)

    def fault(operation: Operation, proceed: Proceed) -> Any:
        meant = match(operation)
        result = proceed(operation)
        if meant:
            callback(operation)
        return result

    return fault


def amid(callback: Callable[[Operation], object], key: str = "*", *, nth: int = 1, times: int | None = 1) -> Fault:
    """`callback` runs when half of the bytes of such a write have arrived.

    A process that kills itself in its data file: `amid(lambda op: os.kill(os.getpid(), signal.SIGKILL), "steps/*")`.
    """
    match = _Match("write", key, nth, times)

    def fault(operation: Operation, proceed: Proceed) -> Any:
        if not match(operation):
            return proceed(operation)
        first, second = _halves(operation)
        proceed(first)
        callback(operation)
        return proceed(second)

    return fault


def _land(operation: Operation, proceed: Proceed, lands: Lands) -> None:
    if lands == "all":
        proceed(operation)
    elif lands == "half" and operation.name == "write":
        proceed(_halves(operation)[0])


def _halves(operation: Operation) -> tuple[Operation, Operation]:
    middle = operation.nbytes // 2
    return (
        replace(operation, data=operation.data[:middle], nbytes=middle),
        replace(
            operation,
            offset=operation.offset + middle,
            data=operation.data[middle:],
            nbytes=operation.nbytes - middle,
        ),
    )
