"""Creating an object once, when the answer may get lost: whatever happened, what is stored decides."""

from __future__ import annotations

from dscheck.errors import CheckpointNotFoundError, StorageError
from dscheck.storage.base import Objects, Storage


def read_if_there(storage: Objects, key: str) -> bytes | None:
    """The whole object, or None when there is none. Any other failure raises: damaged is not "not there" (C15)."""
    try:
        return storage.read(key)
    except CheckpointNotFoundError:
        return None


def put_once(storage: Storage, key: str, data: bytes) -> bytes:
    """Create `key` with `data` unless it is there, and return what is stored afterwards, which may be another's.

    After an error the object is read back: a conditional PUT that succeeded may lose its answer (TRAPS 30). When
    nothing is there, or it cannot be read either, StorageError: the request may still arrive, so nothing that the
    object names may be deleted. It is never sent again from here. Source: docs/commit.md P3, P11.
    """
    failure: StorageError | None = None
    try:
        if storage.put_if_absent(key, data):
            return data
    except StorageError as error:
        failure = error
    try:
        stored = read_if_there(storage, key)
    except StorageError as error:
        raise _unknown(storage, key, f"and it could not be read back: {error}") from failure or error
    if stored is not None:
        return stored
    if failure is not None:
        raise _unknown(storage, key, f"and it is not there: {failure}") from failure
    raise StorageError(
        f"{storage.url}/{key}: the storage says that it exists and that it does not; put-if-absent is not honoured, "
        "or the object was just deleted",
        url=storage.url,
        key=key,
    )


def _unknown(storage: Storage, key: str, what: str) -> StorageError:
    return StorageError(f"{storage.url}/{key}: creating it failed, {what}", url=storage.url, key=key)
