"""A power cut, as a storage that keeps its promises and nothing more lives through it."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dscheck.storage.base import Entry, ObjectWriter, Storage
from dscheck.storage.memory import MemoryStorage

if TYPE_CHECKING:
    from typing_extensions import Buffer


class PowerCut:
    """A Storage whose `cut` gives what the disk may hold when the power goes now.

    Durable is what the protocol promises: an object that was put or committed, and a deletion. Of an object that is
    still being written, or was aborted, any part may be there or nothing. A cut inside of an operation is that
    operation's `crash_after(k)`, with its effect and without, before the cut.
    """

    def __init__(self, storage: Storage | None = None) -> None:
        self._storage = MemoryStorage() if storage is None else storage
        # Objects with bytes that were never made durable: what was written of them.
        self._loose: dict[str, bytearray] = {}
        self._lock = threading.RLock()

    @property
    def url(self) -> str:
        return self._storage.url

    def put_if_absent(self, key: str, data: bytes) -> bool:
        with self._lock:
            created = self._storage.put_if_absent(key, data)
            if created:
                self._loose.pop(key, None)
            return created

    def create(self, key: str) -> ObjectWriter:
        with self._lock:
            writer = self._storage.create(key)
            self._loose[key] = written = bytearray()
        return _LooseWriter(self, key, writer, written)

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        return self._storage.read(key, offset, length)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        self._storage.read_into(key, offset, buffer)

    def list(self, prefix: str) -> Iterator[Entry]:
        return self._storage.list(prefix)

    def delete(self, key: str) -> None:
        with self._lock:
            self._storage.delete(key)
            self._loose.pop(key, None)

    def cut(self, seed: int) -> MemoryStorage:
        """A new storage with what the disk holds after the cut; the same seed has the same luck."""
        luck = random.Random(seed)
        after = MemoryStorage()
        with self._lock:
            for entry in self._storage.list(""):
                if entry.key not in self._loose:
                    after.put_if_absent(entry.key, self._storage.read(entry.key))
            for key, written in sorted(self._loose.items()):
                remains = _remains(bytes(written), luck)
                if remains is not None:
                    after.put_if_absent(key, remains)
        return after


class _LooseWriter:
    def __init__(self, disk: PowerCut, key: str, writer: ObjectWriter, written: bytearray) -> None:
        self._disk, self._key, self._writer, self._written = disk, key, writer, written

    def write(self, data: Buffer) -> None:
        with self._disk._lock:
            self._writer.write(data)
            self._written += memoryview(data)

    def commit(self) -> int:
        with self._disk._lock:
            size = self._writer.commit()
            self._disk._loose.pop(self._key, None)
        return size

    def abort(self) -> None:
        # What was written stays loose: the removal is not synced, and may not have reached the disk.
        with self._disk._lock:
            self._writer.abort()


def _remains(written: bytes, luck: random.Random) -> bytes | None:
    """What an unsynced file may hold: nothing of it, its beginning, zeros where bytes should be, or all."""
    part = luck.randint(0, len(written))
    return luck.choice([None, written[:part], written[:part] + bytes(len(written) - part), written])
