"""A storage that throws bytes away: what is left of a save when writing costs nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dscheck.errors import StorageError
from dscheck.storage import LocalStorage, ObjectWriter

if TYPE_CHECKING:
    from typing_extensions import Buffer


class SinkStorage(LocalStorage):
    """Below a directory: small objects as they are, of large ones (`create`) the length alone, as a hole.

    So a commit finds in the listing what it expects, on all ranks, and nothing of value can be loaded.
    """

    def create(self, key: str) -> ObjectWriter:
        path = os.path.join(self.root, key)
        if os.path.lexists(path):
            raise StorageError(f"'{path}' exists, and no object is overwritten", url=self.url, key=key)
        return _SinkWriter(path)


class _SinkWriter:
    def __init__(self, path: str) -> None:
        self._path, self._length = path, 0

    def write(self, data: Buffer) -> None:
        self._length += memoryview(data).nbytes

    @contextmanager
    def reserved(self, nbytes: int) -> Iterator[int]:
        fd = os.open(os.devnull, os.O_WRONLY)
        try:
            yield fd
        finally:
            os.close(fd)
        self._length = nbytes

    def commit(self) -> int:
        os.makedirs(os.path.dirname(self._path), exist_ok=True)
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            os.ftruncate(fd, self._length)
        finally:
            os.close(fd)
        return self._length

    def abort(self) -> None: ...
