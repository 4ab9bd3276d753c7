"""Creating an object once, when the answer may get lost: whatever happened, what is stored decides."""

from __future__ import annotations

from dscheck.errors import CheckpointNotFoundError, StorageError
from dscheck.storage.base import Storage


def read_if_there(storage: Storage, key: str) -> bytes | None:
    """The whole object, or None when there is none. Any other failure raises: damaged is not "not there" (C15)."""
    try:
        return storage.read(key)
    except CheckpointNotFoundError:
        return None


def put_once(storage: Storage, key: str, data: bytes) -> bytes:
    """Create `key` with `data` unless it is there, and return what is stored afterwards, which may be another's.

    After an error the object is read back (a conditional PUT that succeeded may lose its answer, TRAPS 30); when
    nothing is there either, the error is raised.
    """
    try:
        if storage.put_if_absent(key, data):
            return data
        failure = None
    except StorageError as error:
        failure = error
    stored = read_if_there(storage, key)
    if stored is None:
        raise failure or StorageError(
            f"{storage.url}/{key}: the storage says that it exists and that it does not: it does not honour "
            "put-if-absent",
            url=storage.url,
            key=key,
        )
    return stored
