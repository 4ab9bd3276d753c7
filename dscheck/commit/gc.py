"""Collecting what no step needs: attempts that were never committed, and what deletions and crashes left behind.

Safe beside jobs that save, a job that does not know that it was replaced, loads, and other collections: every rule here
is explored in tests/commit. Source: docs/commit.md P20 to P25.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dscheck.commit.delete import clear, delete_all, delete_step
from dscheck.commit.history import History, read_history
from dscheck.commit.listing import StepRef, list_records, list_terms, read_deletion, unknown
from dscheck.commit.once import put_once
from dscheck.commit.pins import pinned
from dscheck.manifest.keys import deletion_key, parse_attempt_key, parse_plan_key, plan_key, record_key
from dscheck.manifest.record import Deletion, Record, Tombstone, decode_record
from dscheck.storage.base import Entry, Storage, UnfinishedUploads

SAFE_AGE_S = 86400.0
"""No put or upload of a job that lives takes a day: what is older and unfinished, its writer has left behind."""

LATEST_REQUEST_S = 7 * 86400.0
"""No copy of a request is a week late on its way to a storage: what only such a copy could undo is done for good."""

FOLDERS = ("terms/", "records/", "pins/", "plans/", "steps/")


@dataclass(slots=True)
class Collected:
    """What was found and, unless it was a dry run, deleted.

    attempts: never committed, now given up for good. deleted: remains of steps that were deleted before. abandoned:
    steps outside the live history. plans: that no record names, by key. marks: of deleted steps of which nothing is
    left, old enough that no request of then can still arrive. unfinished: uploads and temporary files that killed
    writers left (not counted in a dry run). bytes: of attempts, steps and plans.
    """

    attempts: list[StepRef] = field(default_factory=list)
    deleted: list[StepRef] = field(default_factory=list)
    abandoned: list[StepRef] = field(default_factory=list)
    plans: list[str] = field(default_factory=list)
    marks: list[StepRef] = field(default_factory=list)
    unfinished: int = 0
    bytes: int = 0

    @property
    def refs(self) -> list[StepRef]:
        """All attempts and steps of which something goes."""
        return [*self.attempts, *self.deleted, *self.abandoned]


def collect(
    storage: Storage,
    *,
    by: str,
    now: float,
    abandoned: bool = False,
    dry_run: bool = False,
    safe_age_s: float = SAFE_AGE_S,
) -> Collected:
    """Delete what no step needs; with `abandoned` also the steps outside the live history that are not pinned.

    Raises, before anything is deleted, CorruptCheckpointError for a damaged root or a name that is not ours, and
    UnsupportedFormatError for an object of a later version (C15). StorageError, too, when an answer was lost: what may
    still be needed then stays (P23), and a later collection goes on.
    """
    top = list_terms(storage)
    attempts, plans, pins = _attempts(storage), _plans(storage), pinned(storage)
    tried = _not_named(storage, attempts, top)
    deletions = _read_all(storage, before := read_history(storage))
    if not dry_run:
        for ref in tried:
            _bury(storage, ref, by, now)
    history = read_history(storage, before)
    records = history.records()
    unreachable = sorted(records.keys() - _kept(history, records, top) - pins) if abandoned else []
    found = Collected(abandoned=[ref for ref in unreachable if ref.term < top])
    found.attempts = sorted(ref for ref in attempts.keys() - records.keys() if ref in tried or history.given_up(ref))
    left = list_records(storage)
    found.deleted = sorted(ref for ref in left.deleted if ref in left.taken or ref in attempts)
    old = {ref for ref, deletion in deletions.items() if now - deletion.time > LATEST_REQUEST_S}
    found.marks = sorted(old.difference(found.deleted))
    needed = {plan_key(r.term, r.plan.sha256) for ref, r in records.items() if ref not in found.abandoned}
    found.plans = sorted(entry.key for term, entry in plans if term < top and entry.key not in needed)
    found.bytes = sum(e.size for ref in found.refs for e in attempts.get(ref, ())) + sum(
        entry.size for _, entry in plans if entry.key in found.plans
    )
    if not dry_run:
        _delete(storage, found, records, attempts, by, now)
        if isinstance(storage, UnfinishedUploads):
            found.unfinished = sum(storage.abort_unfinished(folder, safe_age_s) for folder in FOLDERS)
    return found


def _delete(
    storage: Storage,
    found: Collected,
    records: Mapping[StepRef, Record],
    attempts: Mapping[StepRef, list[Entry]],
    by: str,
    now: float,
) -> None:
    """Steps by their marks first, then data, then plans: whatever stops it, a record has what it names."""
    for ref in found.abandoned:
        delete_step(storage, records[ref], by=by, now=now)
    for ref in found.attempts:
        delete_all(storage, [entry.key for entry in attempts[ref]])
    for ref in found.deleted:
        clear(storage, ref)
    delete_all(storage, [*found.plans, *(deletion_key(ref.step, ref.term) for ref in found.marks)])


def _bury(storage: Storage, ref: StepRef, by: str, now: float) -> None:
    """Nobody can commit this attempt any more, or somebody has (P21). Raises StorageError in doubt (P23)."""
    key = record_key(ref.step, ref.term)
    decode_record(put_once(storage, key, Tombstone(ref.step, ref.term, by, now).encode()), key)


def _kept(history: History, records: Mapping[StepRef, Record], top: int) -> set[StepRef]:
    """What a job may have found that claims next, or what counts should the newest term's parent be deleted (P24)."""
    begun = {ref.term for ref in records}
    kept: set[StepRef] = set()
    for number in range(top, 0, -1):
        kept |= set(history.names_from(number))
        if number in begun and history.claim(number).parent is not None:
            break
    return kept


def _attempts(storage: Storage) -> dict[StepRef, list[Entry]]:
    """The objects below steps/ by the attempt that wrote them."""
    found: dict[StepRef, list[Entry]] = {}
    for entry in storage.list("steps/"):
        numbers = parse_attempt_key(entry.key)
        if numbers is None:
            raise unknown(storage, entry.key)
        found.setdefault(StepRef(*numbers), []).append(entry)
    return found


def _plans(storage: Storage) -> list[tuple[int, Entry]]:
    """The objects below plans/, each with its term."""
    found = []
    for entry in storage.list("plans/"):
        term = parse_plan_key(entry.key)
        if term is None:
            raise unknown(storage, entry.key)
        found.append((term, entry))
    return found


def _not_named(storage: Storage, attempts: Iterable[StepRef], top: int) -> list[StepRef]:
    """Attempts of terms older than the newest that have neither record, tombstone nor deletion."""
    names = list_records(storage)
    return sorted(ref for ref in attempts if ref.term < top and ref not in names.taken | names.deleted)


def _read_all(storage: Storage, history: History) -> dict[StepRef, Deletion]:
    """Every small object is one that this version understands; the deletions."""
    for number in history.terms:
        history.claim(number)
    history.records()
    read = {ref: read_deletion(storage, ref) for ref in history.deleted}
    return {ref: deletion for ref, deletion in read.items() if deletion is not None}
