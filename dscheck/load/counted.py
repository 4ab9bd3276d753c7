"""How many bytes of a storage one load reads besides the blocks: history, plan, checksums, objects."""

from __future__ import annotations

from collections.abc import Iterator

from dscheck.storage.base import Entry, ObjectWriter, Storage


class Counted:
    """A Storage that adds up in `nbytes`, which begins as given, what is read of it, on one thread."""

    def __init__(self, storage: Storage, nbytes: int = 0) -> None:
        self._storage, self.nbytes = storage, nbytes

    @property
    def url(self) -> str:
        return self._storage.url

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return self._storage.put_if_absent(key, data)

    def create(self, key: str) -> ObjectWriter:
        return self._storage.create(key)

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        data = self._storage.read(key, offset, length)
        self.nbytes += len(data)
        return data

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        self._storage.read_into(key, offset, buffer)
        self.nbytes += buffer.nbytes

    def list(self, prefix: str) -> Iterator[Entry]:
        return self._storage.list(prefix)

    def delete(self, key: str) -> None:
        self._storage.delete(key)
