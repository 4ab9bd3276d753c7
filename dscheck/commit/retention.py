"""Which steps of a running job's own lineage fall out, and their deletion."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from dscheck.commit.delete import clear, mark_deleted
from dscheck.commit.history import History, read_history
from dscheck.commit.listing import StepRef
from dscheck.commit.pins import pinned
from dscheck.commit.term import assert_newest
from dscheck.config import Keep
from dscheck.manifest.record import Record, Term
from dscheck.storage.base import Storage


@dataclass(frozen=True, slots=True)
class Deleted:
    """What a deletion freed."""

    steps: tuple[StepRef, ...]
    bytes: int


def falls_out(keep: Keep, records: Sequence[Record], pins: Collection[StepRef]) -> list[Record]:
    """Those of the live history, ascending, that `keep` does not keep: never the newest, never a pinned one."""
    kept = {record.step for record in records[-keep.last :]}
    if keep.every is not None:
        kept |= {record.step for record in records if record.step % keep.every == 0}
    if keep.by is not None:
        sign = 1 if keep.mode == "min" else -1
        ranked = sorted((sign * value, -r.step) for r in records if (value := r.metrics.get(keep.by)) is not None)
        kept |= {-step for _, step in ranked[: keep.best]}
    return [r for r in records if r.step not in kept and StepRef(r.step, r.term) not in pins]


class Retention:
    """The rule of one root. Nothing read is read again. One thread at a time."""

    def __init__(self, storage: Storage, keep: Keep) -> None:
        self._storage, self._keep = storage, keep
        self._seen: History | None = None
        self._unfinished: set[StepRef] = set()

    def run(self, term: Term, *, by: str, now: float) -> Deleted:
        """What falls out is deleted, after a commit of the job that owns `term`. Source: docs/commit.md P26.

        Raises SupersededError, and deletes nothing more, when a newer term exists; what the storage and a damaged root
        raise. What is left over then, the next run or `gc` deletes.
        """
        for ref in sorted(self._unfinished):
            clear(self._storage, ref)
            self._unfinished.discard(ref)
        self._seen = history = read_history(self._storage, self._seen)
        records = [history.record(ref) for ref in history.visible]
        steps, nbytes = [], 0
        for record in falls_out(self._keep, records, pinned(self._storage)):
            assert_newest(self._storage, term)
            ref = StepRef(record.step, record.term)
            mark_deleted(self._storage, record, by=by, now=now)
            self._unfinished.add(ref)
            nbytes += clear(self._storage, ref)
            self._unfinished.discard(ref)
            steps.append(ref)
        return Deleted(tuple(steps), nbytes)
