"""Deleting one committed step: a mark first, which nothing undoes, then the record, then the data (C1, C2)."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from dscheck.commit.listing import StepRef
from dscheck.commit.once import put_once
from dscheck.manifest.keys import attempt_prefix, deletion_key, record_key
from dscheck.manifest.record import Deletion, Record, decode_deletion
from dscheck.storage.base import Entry, Storage

THREADS = 8
"""A deletion on an object store takes some 20 ms, and a step has a file a rank."""


def delete_step(storage: Storage, record: Record, *, by: str, now: float) -> int:
    """The step does not exist any more (P25), and what it held is gone; its bytes. Not for the newest step.

    From the mark on no reader takes it for a step, whoever stops where. Doing it again is no error.
    Raises StorageError; when the mark's answer was lost and it is not there, nothing is deleted (P23).
    """
    key = deletion_key(record.step, record.term)
    mark = Deletion(record.step, record.term, record.id, by, now)
    decode_deletion(put_once(storage, key, mark.encode()), key)
    return clear(storage, StepRef(record.step, record.term))


def clear(storage: Storage, ref: StepRef) -> int:
    """The record, then all objects of a step that is marked as deleted are gone; the bytes of the latter."""
    storage.delete(record_key(ref.step, ref.term))
    return delete_all(storage, list(storage.list(attempt_prefix(ref.step, ref.term))))


def delete_all(storage: Storage, entries: Iterable[Entry]) -> int:
    """These objects are gone; their bytes. Raises the first error, after all were tried."""
    chosen = list(entries)
    with ThreadPoolExecutor(max(1, min(THREADS, len(chosen))), "dscheck-delete") as pool:
        for done in [pool.submit(storage.delete, entry.key) for entry in chosen]:
            done.result()
    return sum(entry.size for entry in chosen)
