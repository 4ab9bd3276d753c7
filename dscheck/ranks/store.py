"""Ranks over a TCPStore of our own, hosted by rank 0. Nothing here touches a process group.

Anyone who reaches the port can read and write the store: Store knows no authentication. The token below only keeps
ranks from taking another job's store for theirs.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from datetime import timedelta
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar, cast
from uuid import uuid4

from torch.distributed import (  # type: ignore[attr-defined]
    DistStoreError,
    TCPStore,
)

from dscheck.ranks.board import BoardLostError, BoardTimeoutError
from dscheck.ranks.exchange import BoardRanks

T = TypeVar("T")

# Over 8 MiB a value breaks the connection (torch 2.11 and 2.13).
_CHUNK_BYTES = 1 << 20
# Of larger values only a head lies under their own key, so that reading it before a delete is cheap.
_INLINE_BYTES = 64 << 10
_INLINE, _CHUNKED = b"i", b"c"
_BATCH_KEYS = 64
# How long after its deadline an operation may still come back, so that a last look or an error can be exchanged.
_GRACE_S = 2.0
_CONNECT_S = 3.0
# torch asks DNS for the peer's name, only to log it, while its own timeout runs: 5 s, often more, where DNS is slow.
_TORCH_S = 60.0
_LINGER_S = 2.0
_TOKEN_KEY = "token"


class Store(Protocol):
    """What we use of a TCPStore. Its values are bytes, whatever its stubs say."""

    port: int

    def set(self, key: str, value: bytes) -> None: ...
    def get(self, key: str) -> bytes: ...
    def multi_get(self, keys: list[str]) -> list[bytes]: ...
    def check(self, keys: list[str]) -> bool: ...
    def wait(self, keys: list[str], timeout: timedelta) -> None: ...
    def compare_set(self, key: str, expected: str, desired: bytes) -> bytes: ...
    def add(self, key: str, amount: int) -> int: ...
    def delete_key(self, key: str) -> bool: ...
    def num_keys(self) -> int: ...


class StoreRanks(BoardRanks):
    """The ranks of a job over one TCPStore; rank 0 keeps it up until the others have read what they were answered."""

    def __init__(self, rank: int, size: int, board: StoreBoard) -> None:
        super().__init__(rank, size, board, _LINGER_S)
        # A script that ends without close() must not take the store from ranks that are still reading.
        atexit.register(self.close)

    def close(self) -> None:
        atexit.unregister(self.close)
        super().close()


class StoreBoard:
    """A board in a TCPStore. Every call has a connection for its own as long as it lasts."""

    def __init__(self, hosts: Sequence[str], port: int, token: str, server: Store | None = None) -> None:
        """`hosts`: names under which the server may be known, tried in order; `server`: on the rank that hosts it."""
        self._hosts = list(hosts)
        self._port = port
        self._token = token
        self._server = server
        self._idle: list[_Client] = []
        self._lock = threading.Lock()
        self._closed = False

    def put(self, key: str, value: bytes, until: float) -> None:
        self._call(lambda store: _put(store, key, value), until)

    def put_once(self, key: str, value: bytes, until: float) -> bytes:
        return self._call(lambda store: _put_once(store, key, value), until)

    def add(self, key: str, until: float) -> int:
        return self._call(lambda store: store.add(key, 1), until)

    def wait(self, key: str, until: float) -> bytes | None:
        return self._call(lambda store: _wait(store, key, until), until)

    def look(self, key: str, until: float) -> bytes | None:
        return self._call(lambda store: _look(store, key), until)

    def read(self, keys: Sequence[str], until: float) -> list[bytes] | None:
        return self._call(lambda store: _read(store, keys), until)

    def absent(self, keys: Sequence[str], until: float) -> list[str]:
        return self._call(lambda store: _absent(store, list(keys)), until)

    def delete(self, keys: Sequence[str], until: float) -> None:
        self._call(lambda store: _delete(store, keys), until)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for client in idle:
            client.leave()
        for client in idle:
            client.join()
        self._server = None

    def _call(self, job: Callable[[Store], T], until: float) -> T:
        """What `job` returns on a connection that no other thread uses meanwhile; a failed one is not used again."""
        with self._lock:
            client = self._idle.pop() if self._idle else _Client(self._connect)
        try:
            result = client.call(job, until)
        except BaseException:
            client.leave()
            raise
        with self._lock:
            if not self._closed:
                self._idle.append(client)
                return result
        client.leave()
        client.join()
        return result

    def _connect(self) -> Store:
        tried = []
        for host in self._hosts:
            try:
                store = _connect(host, self._port, self._token)
            except (OSError, RuntimeError) as error:
                tried.append(f"{host}:{self._port} ({_first_line(error)})")
                continue
            self._hosts = [host]
            return store
        raise BoardLostError(f"no connection to its store at {', '.join(tried)}")


class _Client:
    """A connection and the one thread that uses it.

    torch's calls cannot be interrupted, and against a server that hangs (SIGSTOP, a host without power) they outlast
    their own timeout: `wait` sends a cancel and blocks for the reply. So a caller waits for the thread, not for torch.
    """

    def __init__(self, connect: Callable[[], Store]) -> None:
        self._connect = connect
        self._jobs: SimpleQueue[tuple[Callable[[Store], Any], Future[Any]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="dscheck-store", daemon=True)
        self._thread.start()

    def call(self, job: Callable[[Store], T], until: float) -> T:
        future: Future[T] = Future()
        self._jobs.put((job, future))
        try:
            return future.result(max(0.0, until - time.monotonic()) + _GRACE_S)
        except TimeoutError as late:
            raise BoardTimeoutError from late

    def leave(self) -> None:
        """Let the thread end, and the connection with it, as soon as its present call does."""
        self._jobs.put(None)

    def join(self) -> None:
        """Return when the thread has ended, if it was not in a call: the end of the interpreter must not meet it in
        C++ frames, which may not be unwound.
        """
        self._thread.join(_GRACE_S)

    def _serve(self) -> None:
        store = None
        while (task := self._jobs.get()) is not None:
            job, future = task
            try:
                store = store or self._connect()
                future.set_result(job(store))
            except RuntimeError as error:  # torch's DistError and what the bindings raise themselves
                future.set_exception(BoardLostError(_first_line(error)))
            except BaseException as error:
                future.set_exception(error)
            del task, job, future


def host_store(port: int, token: str) -> Store:
    """A new, empty store that listens on `port` (0: any free one) of all interfaces. Raises RuntimeError when taken."""
    server = _tcp_store("localhost", port, hosts=True)
    server.set(_TOKEN_KEY, token.encode())
    return server


def _tcp_store(host: str, port: int, *, hosts: bool) -> Store:
    return cast(Store, TCPStore(host, port, None, hosts, timedelta(seconds=_TORCH_S), wait_for_workers=False))


def _connect(host: str, port: int, token: str) -> Store:
    # TCPStore tries again, and complains to stderr, until its timeout; a plain socket knows at once.
    socket.create_connection((host, port), timeout=_CONNECT_S).close()
    store = _tcp_store(host, port, hosts=False)
    if not (store.check([_TOKEN_KEY]) and store.get(_TOKEN_KEY) == token.encode()):
        raise OSError("another job's store listens there")
    return store


def _put(store: Store, key: str, value: bytes) -> None:
    store.set(key, _head(store, key, value))
    # `set` has no reply, and none is no sign of life; this has one.
    store.check([key])


def _put_once(store: Store, key: str, value: bytes) -> bytes:
    head = _head(store, key, value)
    stands = store.compare_set(key, "", head)
    if stands == head:
        return value
    _delete_chunks(store, head)
    return _open(store, stands)


def _wait(store: Store, key: str, until: float) -> bytes | None:
    # To the deadline in one piece: each slice that ran out would put two lines of torch's on stderr. 0 means forever.
    left_s = max(until - time.monotonic(), 0.001)
    with contextlib.suppress(DistStoreError):
        store.wait([key], timedelta(seconds=left_s))
    return _look(store, key)


def _look(store: Store, key: str) -> bytes | None:
    return _open(store, store.get(key)) if store.check([key]) else None


def _read(store: Store, keys: Sequence[str]) -> list[bytes] | None:
    values: list[bytes] = []
    for start in range(0, len(keys), _BATCH_KEYS):
        batch = list(keys[start : start + _BATCH_KEYS])
        # Without the check a missing key would be waited for.
        if not store.check(batch):
            return None
        values += [_open(store, head) for head in store.multi_get(batch)]
    return values


def _absent(store: Store, keys: list[str]) -> list[str]:
    """Which keys are not set, by halving: `check` says only whether all are."""
    if not keys or store.check(keys):
        return []
    if len(keys) == 1:
        return keys
    half = len(keys) // 2
    return _absent(store, keys[:half]) + _absent(store, keys[half:])


def _delete(store: Store, keys: Sequence[str]) -> None:
    for key in keys:
        if store.check([key]):
            _delete_chunks(store, store.get(key))
            store.delete_key(key)


def _head(store: Store, key: str, value: bytes) -> bytes:
    """What stands under `key` for `value`, after the chunks of a long value are in the store."""
    if len(value) <= _INLINE_BYTES:
        return _INLINE + value
    # A name of its own: ranks that put the same key at once must not mix their chunks.
    head = _CHUNKED + json.dumps([f"{key}/{uuid4().hex}", -(-len(value) // _CHUNK_BYTES)]).encode()
    for index, chunk in enumerate(_chunks(head)):
        store.set(chunk, value[index * _CHUNK_BYTES : (index + 1) * _CHUNK_BYTES])
    return head


def _open(store: Store, head: bytes) -> bytes:
    return head[1:] if head[:1] == _INLINE else b"".join(store.get(chunk) for chunk in _chunks(head))


def _delete_chunks(store: Store, head: bytes) -> None:
    for chunk in _chunks(head):
        store.delete_key(chunk)


def _chunks(head: bytes) -> Iterator[str]:
    if head[:1] == _CHUNKED:
        prefix, count = json.loads(head[1:])
        yield from (f"{prefix}/{index}" for index in range(count))


def _first_line(error: BaseException) -> str:
    # torch appends its C++ stack.
    return str(error).partition("\n")[0] or type(error).__name__
