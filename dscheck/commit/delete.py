"""Deleting one committed step: a mark first, which nothing undoes, then the record, then the data (C1, C2)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from dscheck.commit.listing import StepRef
from dscheck.commit.once import put_once
from dscheck.manifest.keys import attempt_prefix, deletion_key, record_key
from dscheck.manifest.record import Deletion, Record, decode_deletion
from dscheck.storage.base import Storage

THREADS = 8
"""A deletion on an object store takes some 20 ms, and a step has a file a rank."""


def delete_step(storage: Storage, record: Record, *, by: str, now: float) -> int:
    """The step does not exist any more (P25), and what it held is gone; its bytes. Raises as `mark_deleted` does."""
    mark_deleted(storage, record, by=by, now=now)
    return clear(storage, StepRef(record.step, record.term))


def mark_deleted(storage: Storage, record: Record, *, by: str, now: float) -> None:
    """From here on no reader takes it for a step, whoever stops where. Doing it again is no error.

    Raises StorageError; when the mark's answer was lost and it is not there, nothing may be deleted (P23).
    """
    key = deletion_key(record.step, record.term)
    mark = Deletion(record.step, record.term, record.id, by, now)
    decode_deletion(put_once(storage, key, mark.encode()), key)


def clear(storage: Storage, ref: StepRef) -> int:
    """The record, then all objects of a step that is marked as deleted are gone; the bytes of the latter."""
    storage.delete(record_key(ref.step, ref.term))
    entries = list(storage.list(attempt_prefix(ref.step, ref.term)))
    delete_all(storage, [entry.key for entry in entries])
    return sum(entry.size for entry in entries)


def delete_all(storage: Storage, keys: Sequence[str]) -> None:
    """These objects are gone. Raises the first error."""
    if len(keys) < THREADS:
        for key in keys:
            storage.delete(key)
        return
    with ThreadPoolExecutor(THREADS, "dscheck-delete") as pool:
        for done in [pool.submit(storage.delete, key) for key in keys]:
            done.result()
