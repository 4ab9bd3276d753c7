"""The one act that makes a step exist, and what must be true before it and after it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dscheck.commit.listing import StepRef, read_deletion, read_step
from dscheck.commit.once import put_once
from dscheck.commit.term import confirm, refuse_newer
from dscheck.errors import ConfigError, CorruptCheckpointError, StorageError, SupersededError
from dscheck.manifest.keys import attempt_prefix, data_key, files_key, plan_key, record_key
from dscheck.manifest.record import Digest, Record, Tombstone, decode_record
from dscheck.storage.base import Storage

if TYPE_CHECKING:  # whoever lists steps needs neither pyarrow nor NumPy
    from dscheck.manifest.arrow import EncodedPlan
    from dscheck.manifest.files import FileRow


def put_plan(storage: Storage, term: int, plan: EncodedPlan) -> Digest:
    """Store a plan under the digest of its head, which holds those of the rest, for its own term only (TRAPS 37)."""
    put_same(storage, plan_key(term, plan.head.sha256), plan.data)
    return plan.head


def put_files(storage: Storage, step: int, term: int, data: bytes) -> Digest:
    """Store the attempt's files.arrow."""
    put_same(storage, files_key(step, term), data)
    return Digest(len(data), hashlib.sha256(data).hexdigest())


def check_files(storage: Storage, step: int, term: int, files: Sequence[FileRow], only: int | None = None) -> None:
    """Every data file is in the listing with the size that its rank wrote, and no other (C4). Raises StorageError.

    `only`: in a storage of this node alone that of this rank must be there, those of others may.
    """
    found = {entry.key: entry.size for entry in storage.list(attempt_prefix(step, term))}
    expected = {data_key(step, term, row.rank): row.size for row in files}
    for row, (key, size) in zip(files, expected.items(), strict=True):
        if found.get(key) != size and (only in (None, row.rank) or key in found):
            seen = f"with {found[key]} bytes" if key in found else "without it"
            raise StorageError(
                f"{storage.url}/{key}: its rank wrote {size} bytes, the listing comes {seen}; step {step} is not "
                "committed",
                url=storage.url,
                key=key,
            )
    extra = sorted(found.keys() - expected.keys() - {files_key(step, term)})
    if extra:
        raise StorageError(
            f"{storage.url}/{extra[0]}: no rank of this job wrote it ({len(extra)} such objects); step {step} is not "
            "committed: save it again, in a new term",
            url=storage.url,
            key=extra[0],
        )


def publish(storage: Storage, record: Record) -> Record:
    """The step exists and is this job's to acknowledge (C1). All that `record` names is durable before this is called.

    Raises SupersededError when a newer term exists, or when gc gave the step up: nothing was written; StorageError when
    another record has the name, or when nobody can say whether ours has: then nothing of the attempt may be deleted;
    ConfigError for a step that does not exceed the one that its term continues from. A newer claim that comes while the
    record is created is not looked for: it wins, and the next call finds it (P10).
    """
    key = record_key(record.step, record.term)
    parent = confirm(storage, record.term, record.term_id).parent
    if parent is not None and record.step <= parent[1]:
        raise ConfigError(f"step {record.step} does not exceed step {parent[1]}, from which this job continues")
    refuse_newer(storage, record.term)
    stored = decode_record(put_once(storage, key, record.encode()), key)
    if isinstance(stored, Tombstone):
        raise _given_up(storage, stored)
    if stored.id != record.id:
        raise StorageError(
            f"{storage.url}/{key}: another attempt has committed this step; a step is tried once in a term: claim a "
            "new one",
            url=storage.url,
            key=key,
        )
    return stored


def await_record(
    storage: Storage, step: int, term: int, identity: str, *, deadline: float = 0.0, poll_s: float = 0.2
) -> bool:
    """Whether the attempt `identity` committed after all: for a rank without an answer (C7).

    Reads at once, then every `poll_s` seconds until `deadline` on time.monotonic() (the default: once). A step that has
    been deleted since was committed.
    Raises SupersededError for a tombstone; CorruptCheckpointError when another attempt has the name.
    """
    while True:
        found = read_step(storage, StepRef(step, term))
        if found is not None or time.monotonic() >= deadline:
            break
        time.sleep(poll_s)
    if found is None:
        deletion = read_deletion(storage, StepRef(step, term))
        return deletion is not None and deletion.id == identity
    if isinstance(found, Tombstone):
        raise _given_up(storage, found)
    if found.id != identity:
        key = record_key(step, term)
        raise CorruptCheckpointError(f"{storage.url}/{key}: another attempt has this step's record", key=key)
    return True


def put_same(storage: Storage, key: str, data: bytes) -> None:
    """`key` holds exactly `data`, which may have been there before. Raises StorageError when something else is."""
    if put_once(storage, key, data) != data:
        raise StorageError(
            f"{storage.url}/{key}: another object is there already, and no object is ever overwritten: claim a new "
            "term",
            url=storage.url,
            key=key,
        )


def _given_up(storage: Storage, found: Tombstone) -> SupersededError:
    return SupersededError(
        f"{storage.url}: step {found.step} of term {found.term} was given up by gc ({found.by}) before it was "
        "committed, which happens only when a newer term exists: this job must not save there any more",
        term=found.term,
        host=found.by,
        time=found.time,
    )
