"""The one act that makes a step exist, and what must be true before it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from dscheck.commit.once import put_once, read_if_there
from dscheck.commit.term import assert_newest, read_term
from dscheck.errors import CorruptCheckpointError, StorageError, SupersededError
from dscheck.manifest.files import FileRow
from dscheck.manifest.keys import attempt_prefix, data_key, files_key, plan_key, record_key
from dscheck.manifest.record import Record, Tombstone, decode_record
from dscheck.storage.base import Storage


def put_plan(storage: Storage, term: int, data: bytes) -> None:
    """Store a plan under the digest of its bytes, for its own term only (TRAPS 37)."""
    _put_same(storage, plan_key(term, hashlib.sha256(data).hexdigest()), data)


def put_files(storage: Storage, step: int, term: int, data: bytes) -> None:
    """Store the attempt's files.arrow."""
    _put_same(storage, files_key(step, term), data)


def _put_same(storage: Storage, key: str, data: bytes) -> None:
    if put_once(storage, key, data) != data:
        raise StorageError(
            f"{storage.url}/{key}: another object is there already; no object is ever overwritten",
            url=storage.url,
            key=key,
        )


def check_files(storage: Storage, step: int, term: int, files: Sequence[FileRow]) -> None:
    """Every data file is in the listing with the size that its rank wrote, and no other (C4). Raises StorageError."""
    prefix = attempt_prefix(step, term)
    found = {entry.key: entry.size for entry in storage.list(prefix)}
    expected = {data_key(step, term, row.rank): row.size for row in files}
    for key, size in expected.items():
        if found.get(key) != size:
            seen = "not there" if key not in found else f"of {found[key]} bytes"
            raise StorageError(
                f"{storage.url}/{key}: its rank wrote {size} bytes, but the listing shows it {seen}; step {step} is "
                f"not "
                "committed",
                url=storage.url,
                key=key,
            )
    extra = sorted(found.keys() - expected.keys() - {files_key(step, term)})
    if extra:
        raise StorageError(
            f"{storage.url}/{extra[0]}: nobody of this job wrote it; step {step} is not committed",
            url=storage.url,
            key=extra[0],
        )


def publish(storage: Storage, record: Record) -> None:
    """Make the step exist (C1). Everything that `record` names is durable before this is called.

    Returns when our record is stored, whatever answers were lost. Raises SupersededError when a newer term exists;
    StorageError when another record or a tombstone has the name, or when the storage fails and nothing is stored.
    """
    key = record_key(record.step, record.term)
    assert_newest(storage, read_term(storage, record.term))
    stored = decode_record(put_once(storage, key, record.encode()), key)
    if isinstance(stored, Tombstone):
        raise SupersededError(
            f"{storage.url}/{key}: gc of a newer term gave this step up before it was committed", term=record.term
        )
    if stored.id != record.id:
        raise StorageError(f"{storage.url}/{key}: another attempt has committed this step", url=storage.url, key=key)


def await_record(storage: Storage, step: int, term: int, identity: str) -> bool:
    """Whether the attempt `identity` committed after all: for a rank that got no answer (C7)."""
    key = record_key(step, term)
    stored = read_if_there(storage, key)
    if stored is None:
        return False
    found = decode_record(stored, key)
    if isinstance(found, Record) and found.id != identity:
        raise CorruptCheckpointError(f"{storage.url}/{key}: another attempt has this step's record", key=key)
    return isinstance(found, Record)
