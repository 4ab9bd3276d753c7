"""Objects in the memory of one process, for tests and for jobs of one rank. One name is one store."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dscheck.errors import CheckpointNotFoundError, StorageError
from dscheck.storage.base import Entry, ObjectWriter
from dscheck.storage.keys import check_key, check_prefix, check_range

if TYPE_CHECKING:
    from typing_extensions import Buffer


@dataclass(slots=True)
class _Store:
    objects: dict[str, bytearray] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


_STORES: dict[str, _Store] = {}
_STORES_LOCK = threading.Lock()
_NUMBERS = itertools.count()


class MemoryStorage:
    """A Storage whose objects live as long as the process does; `MemoryStorage()` has a store of its own.

    As in LocalStorage an object shows from `create` on, growing: what a killed writer leaves is there to be seen.
    """

    def __init__(self, name: str | None = None) -> None:
        if name is None:
            self.name, self._store = f"private-{next(_NUMBERS)}", _Store()
            return
        self.name = name
        with _STORES_LOCK:
            self._store = _STORES.setdefault(name, _Store())

    @property
    def url(self) -> str:
        return f"memory://{self.name}"

    def put_if_absent(self, key: str, data: bytes) -> bool:
        check_key(self.url, key)
        with self._store.lock:
            if key in self._store.objects:
                return False
            self._store.objects[key] = bytearray(data)
            return True

    def create(self, key: str) -> ObjectWriter:
        check_key(self.url, key)
        with self._store.lock:
            if key in self._store.objects:
                raise StorageError(f"'{self.url}/{key}' exists, and no object is overwritten", url=self.url, key=key)
            self._store.objects[key] = content = bytearray()
        return _MemoryWriter(self._store, self.url, key, content)

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        with self._store.lock:
            return bytes(self._range(key, offset, length))

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        with self._store.lock, self._range(key, offset, buffer.nbytes) as source:
            buffer[:] = source

    def list(self, prefix: str) -> Iterator[Entry]:
        check_prefix(self.url, prefix)
        with self._store.lock:
            entries = [Entry(key, len(data)) for key, data in self._store.objects.items() if key.startswith(prefix)]
        return iter(entries)

    def delete(self, key: str) -> None:
        check_key(self.url, key)
        with self._store.lock:
            self._store.objects.pop(key, None)

    def _range(self, key: str, offset: int, length: int | None) -> memoryview:
        """A view of the range asked for, to be dropped before the lock is: a bytearray in view cannot grow."""
        check_key(self.url, key)
        data = self._store.objects.get(key)
        if data is None:
            raise CheckpointNotFoundError(f"there is no object '{self.url}/{key}'", url=self.url, key=key)
        check_range(self.url, key, offset, length, len(data))
        stop = len(data) if length is None else offset + length
        return memoryview(data)[offset:stop]


class _MemoryWriter:
    """One object under way. `_open` is false from the first failure, commit or abort on."""

    def __init__(self, store: _Store, url: str, key: str, content: bytearray) -> None:
        self._store, self._url, self._key, self._content = store, url, key, content
        self._open = True
        self._committed = False

    def write(self, data: Buffer) -> None:
        with self._store.lock:
            self._require_open("write to")
            self._content += memoryview(data)

    def commit(self) -> int:
        with self._store.lock:
            self._require_open("commit")
            self._open = False
            if self._store.objects.get(self._key) is not self._content:
                raise StorageError(
                    f"'{self._url}/{self._key}' was deleted while it was written", url=self._url, key=self._key
                )
            self._committed = True
            return len(self._content)

    def abort(self) -> None:
        with self._store.lock:
            self._open = False
            if not self._committed and self._store.objects.get(self._key) is self._content:
                del self._store.objects[self._key]

    def _require_open(self, doing: str) -> None:
        if not self._open:
            raise StorageError(
                f"cannot {doing} '{self._url}/{self._key}': it was committed or given up before",
                url=self._url,
                key=self._key,
            )
