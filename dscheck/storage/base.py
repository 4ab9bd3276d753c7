"""What dscheck asks of a storage: six verbs over keys below one root. Implementations know bytes, never tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from typing_extensions import Buffer


@dataclass(frozen=True, slots=True)
class Entry:
    """One object as a listing shows it."""

    key: str
    size: int


class ObjectWriter(Protocol):
    """One new object while it is written. Leaving it uncommitted leaves nothing that a reader could take for whole."""

    def write(self, data: Buffer) -> None:
        """Append all bytes of `data`, which the caller may reuse when this returns. A short write is a StorageError."""

    def commit(self) -> int:
        """Make the object and every directory above it durable and return its size in bytes. A failure is final."""

    def abort(self) -> None:
        """Give up: close, and drop what a store would keep unseen (an unfinished upload). Never raises; idempotent."""


@runtime_checkable
class FileWriter(ObjectWriter, Protocol):
    """The writer of an object that is a file of this machine, which native threads may fill."""

    def reserved(self, nbytes: int) -> AbstractContextManager[int]:
        """The descriptor of the file, nothing of which is written yet. The caller writes its first `nbytes` bytes
        itself, at any positions, before it leaves; `write` goes on behind them. An OSError inside is raised as a
        StorageError; after any error the writer is not usable.
        """


class Objects(Protocol):
    """What a reader of the history asks of a storage."""

    @property
    def url(self) -> str:
        """As of a Storage."""

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """As of a Storage."""

    def list(self, prefix: str) -> Iterator[Entry]:
        """As of a Storage."""


@runtime_checkable
class PartWriter(ObjectWriter, Protocol):
    """The writer of an object that may be put in parts instead of by `write`, several at once."""

    parts_in_flight: int
    """How many at once reach the rate of the storage."""

    def part_bytes(self, nbytes: int) -> int:
        """Of each part but the last, which may be shorter, of an object of `nbytes` bytes."""

    def put_part(self, number: int, buffers: Sequence[memoryview]) -> None:
        """Put part `number`, counted from 0, which is these buffers (contiguous, bytes) one after the other. They may
        be reused when it returns. Any thread; parts may come in any order, and all of them before `commit`. `abort`
        ends those under way, and returns when nothing reads their buffers any more.
        """


@runtime_checkable
class Storage(Protocol):
    """Objects below one root, named by relative keys (`records/300-2.json`).

    All methods may be called from any thread. Failures raise StorageError with `url` and `key`; a key that is not there
    raises CheckpointNotFoundError. Keys with a part that begins with a dot never show in `list` (docs/format.md F2).
    """

    @property
    def url(self) -> str:
        """The root as a user would write it, without credentials."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Create `key` with exactly `data`, durably and atomically; False, changing nothing, when it already exists.

        A reader sees the whole object or none. After an error the outcome is unknown: the caller reads back.
        Where the store has no such condition it replaces the object and returns True, which a claim finds out
        (docs/commit.md P4): nothing is written there but with `commit="single-writer"`.
        """

    def create(self, key: str) -> ObjectWriter:
        """Start a new large object. Raises StorageError when `key` already exists: no object is ever overwritten."""

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """Bytes [offset, offset + length) of `key`, or to its end. Raises CorruptCheckpointError when it is shorter."""

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """Fill all of `buffer` (contiguous, writable, bytes) from `offset`. Raises as `read` does."""

    def list(self, prefix: str) -> Iterator[Entry]:
        """Every object whose key starts with `prefix` (a folder with its slash), in any order; none is no error."""

    def delete(self, key: str) -> None:
        """Remove `key`, durably; one that is not there is no error."""


@runtime_checkable
class MayLackCondition(Protocol):
    """What a Storage offers besides whose store may have no put-if-absent: it says so before a claim is put there."""

    def lacks_condition(self) -> str | None:
        """Why `put_if_absent` would replace what is there; None when it was tried, against a rival too, and held.

        Tried once, with objects that no listing shows and that are gone afterwards. Raises StorageError.
        """


@runtime_checkable
class UnfinishedUploads(Protocol):
    """What a Storage may offer besides: to find what killed writers have left where no listing shows it."""

    def abort_unfinished(self, prefix: str, older_than_s: float) -> int:
        """Remove uploads and temporary files of keys that start with `prefix`, begun over `older_than_s` seconds ago.

        Returns their number. Those of writers that live must be younger. Raises StorageError.
        """


@runtime_checkable
class LocalFiles(Protocol):
    """What a Storage may offer besides: its objects are files of this machine, which native threads read faster."""

    def open_local(self, key: str) -> AbstractContextManager[tuple[int, int]]:
        """A descriptor of `key`, open for reading until the context ends, and its size in bytes. Raises as `read`."""


@runtime_checkable
class Requests(Protocol):
    """What a Storage may say besides: how many reads at once reach its rate, since each of them waits for an answer."""

    @property
    def requests_in_flight(self) -> int: ...
