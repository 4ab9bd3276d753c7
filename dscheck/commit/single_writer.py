"""Commits where the store has no condition, as long as only one job writes there. Source: docs/commit.md P28 to P31."""

from __future__ import annotations

from collections.abc import Iterator

from dscheck.errors import CheckpointNotFoundError
from dscheck.storage.base import Entry, ObjectWriter, Storage


class SingleWriter:
    """A Storage whose `put_if_absent` looks whether the key is free, and puts then.

    What another job puts between the look and the put is replaced, where `storage` has no condition; where it has one,
    it still decides. All else is that of `storage`.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    @property
    def url(self) -> str:
        return self._storage.url

    def put_if_absent(self, key: str, data: bytes) -> bool:
        try:
            self._storage.read(key, 0, 0)
        except CheckpointNotFoundError:
            return self._storage.put_if_absent(key, data)
        return False

    def create(self, key: str) -> ObjectWriter:
        return self._storage.create(key)

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        return self._storage.read(key, offset, length)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        self._storage.read_into(key, offset, buffer)

    def list(self, prefix: str) -> Iterator[Entry]:
        return self._storage.list(prefix)

    def delete(self, key: str) -> None:
        self._storage.delete(key)
