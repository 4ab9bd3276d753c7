"""Which steps of a running job's own lineage fall out, and their deletion."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from dscheck.commit.delete import clear, mark_deleted
from dscheck.commit.history import read_history
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
    """The rule of one root, kept from commit to commit. One thread at a time.

    The root is listed at the first run of a term; from then on the steps that the job commits are told.
    """

    def __init__(self, storage: Storage, keep: Keep) -> None:
        self._storage, self._keep = storage, keep
        self._term: Term | None = None
        self._live: dict[StepRef, Record] = {}
        self._unfinished: set[StepRef] = set()

    def run(self, term: Term, committed: Iterable[Record], *, by: str, now: float) -> Deleted:
        """What falls out is deleted, after the job that owns `term` has committed these. Source: docs/commit.md P26.

        Raises SupersededError, and deletes nothing more, when a newer term exists; what the storage and a damaged root
        raise. What is left over then, the next run or `gc` deletes.
        """
        self._learn(term, committed)
        for ref in sorted(self._unfinished):
            clear(self._storage, ref)
            self._unfinished.discard(ref)
        steps, nbytes = [], 0
        live = [self._live[ref] for ref in sorted(self._live)]
        for record in falls_out(self._keep, live, pinned(self._storage)):
            assert_newest(self._storage, term)
            ref = StepRef(record.step, record.term)
            mark_deleted(self._storage, record, by=by, now=now)
            del self._live[ref]
            self._unfinished.add(ref)
            nbytes += clear(self._storage, ref)
            self._unfinished.discard(ref)
            steps.append(ref)
        return Deleted(tuple(steps), nbytes)

    def _learn(self, term: Term, committed: Iterable[Record]) -> None:
        if self._term != term:
            history = read_history(self._storage)
            self._live = {ref: history.record(ref) for ref in history.visible}
            self._term = term
        self._live |= {StepRef(record.step, record.term): record for record in committed}
