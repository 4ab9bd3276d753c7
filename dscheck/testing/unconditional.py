"""A store that ignores the condition of a put, as some S3 gateways and most file systems of fsspec do."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from dscheck.storage.base import Entry, ObjectWriter, Storage


class Unconditional:
    """A Storage whose `put_if_absent` replaces what is there and returns True. All else is that of `storage`."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return self._storage.url

    def put_if_absent(self, key: str, data: bytes) -> bool:
        with self._lock:
            self._storage.delete(key)
            return self._storage.put_if_absent(key, data)

    def create(self, key: str) -> ObjectWriter:
        return self._storage.create(key)

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        with self._lock:  # what is replaced is there at any time
            return self._storage.read(key, offset, length)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        self._storage.read_into(key, offset, buffer)

    def list(self, prefix: str) -> Iterator[Entry]:
        with self._lock:
            return iter(list(self._storage.list(prefix)))

    def delete(self, key: str) -> None:
        self._storage.delete(key)
