"""What the names in `records/` and `terms/` say, and what is behind one of them."""

from __future__ import annotations

from dataclasses import dataclass

from dscheck.commit.once import read_if_there
from dscheck.errors import CheckpointNotFoundError, CorruptCheckpointError
from dscheck.manifest.keys import deletion_key, parse_deletion_key, parse_record_key, parse_term_key, record_key
from dscheck.manifest.record import Deletion, Record, Tombstone, decode_deletion, decode_record
from dscheck.storage.base import Objects


@dataclass(frozen=True, slots=True, order=True)
class StepRef:
    """A step as one term committed it."""

    step: int
    term: int


class Changed(Exception):
    """A record that was listed is gone: the listing is older than a deletion, and cannot be trusted any more (P15)."""


@dataclass(frozen=True, slots=True)
class Names:
    """What one listing of records/ shows: whose record, or tombstone, has its name; and which steps were deleted."""

    taken: frozenset[StepRef]
    deleted: frozenset[StepRef]

    @property
    def steps(self) -> frozenset[StepRef]:
        """Steps that were committed and not deleted, and tombstones."""
        return self.taken - self.deleted


def list_records(storage: Objects) -> Names:
    """The names in records/. Unknown ones are damage (P19)."""
    taken, deleted = set(), set()
    for entry in storage.list("records/"):
        if (numbers := parse_record_key(entry.key)) is not None:
            taken.add(StepRef(*numbers))
        elif (numbers := parse_deletion_key(entry.key)) is not None:
            deleted.add(StepRef(*numbers))
        else:
            raise unknown(storage, entry.key)
    return Names(frozenset(taken), frozenset(deleted))


def list_terms(storage: Objects) -> int:
    """The highest claimed term, 0 for none; all below it are there. Unknown names and gaps are damage (P19)."""
    found = set()
    for entry in storage.list("terms/"):
        term = parse_term_key(entry.key)
        if term is None:
            raise unknown(storage, entry.key)
        found.add(term)
    newest = max(found, default=0)
    missing = next((term for term in range(1, newest + 1) if term not in found), None)
    if missing is not None or 0 in found:
        what = f"terms/{newest}.json is there, terms/{missing}.json is not" if missing else "terms/0.json is there"
        raise CorruptCheckpointError(
            f"{storage.url}: {what}; terms are numbered from 1 without a gap, so the root is damaged: restore it from "
            "a copy",
            key=f"terms/{missing or 0}.json",
        )
    return newest


def read_step(storage: Objects, ref: StepRef) -> Record | Tombstone | None:
    """What has the record's name, None when nothing does."""
    key = record_key(ref.step, ref.term)
    stored = read_if_there(storage, key)
    return None if stored is None else decode_record(stored, key)


def read_deletion(storage: Objects, ref: StepRef) -> Deletion | None:
    """That the step was deleted, None when it was not."""
    key = deletion_key(ref.step, ref.term)
    stored = read_if_there(storage, key)
    return None if stored is None else decode_deletion(stored, key)


LOOKS = 8
"""Each look that fails met a deletion or a claim between its LIST and its reads: many in a row are a fault."""


def unsteady(storage: Objects) -> CheckpointNotFoundError:
    return CheckpointNotFoundError(
        f"{storage.url}: {LOOKS} times in a row it changed between its listing and the reads that followed; something "
        "deletes steps there, or job after job claims it: stop that, and try again"
    )


def unknown(storage: Objects, key: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"{storage.url}/{key}: dscheck writes no object of this name; it may be of a newer version, or not belong "
        "there: update dscheck, or move it away",
        key=key,
    )
