"""Committed steps from one root to another, between any two storages: verified, resumable, the record last.

At every moment the destination is a sound root that holds whole steps only (docs/commit.md P32 to P35).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from dscheck.commit.blocks import stored_blocks
from dscheck.commit.contents import Contents
from dscheck.commit.history import History, read_history
from dscheck.commit.listing import StepRef, read_step
from dscheck.commit.transfer import copy_claims, copy_file, finish, is_same
from dscheck.commit.workers import side_by_side
from dscheck.errors import DeadlineError
from dscheck.manifest.keys import attempt_prefix, data_key
from dscheck.manifest.record import Record, Tombstone
from dscheck.storage.base import Storage

Outcome = Literal["copied", "there", "deleted there", "to copy"]


@dataclass(frozen=True, slots=True)
class StepCopy:
    """What became of one step: `nbytes` of data files in all, of which `missing_bytes` were not there before.

    "deleted there": the destination has given the step up, which is for good. "to copy": a dry run.
    """

    step: int
    term: int
    outcome: Outcome
    nbytes: int
    missing_bytes: int


@dataclass(frozen=True, slots=True)
class Copying:
    """How a copy runs: `threads` data files at a time, each with up to three parts of 8 MiB in memory.

    It is given up when nothing has moved for `patience_s` seconds; `advance` is told the bytes as they arrive.
    """

    threads: int = 4
    patience_s: float = 600.0
    advance: Callable[[int], None] = lambda nbytes: None


class CopyPlan:
    """What is to be copied from `source` to `destination`: the live history there, or only some `steps` of it.

    Raises CheckpointNotFoundError for a step that is not of the live history; what reading a damaged root raises.
    """

    def __init__(self, source: Storage, destination: Storage, steps: Sequence[int] | None = None) -> None:
        self._source, self._destination = source, destination
        self._history = read_history(source)
        there = read_history(destination)
        self._all = steps is None
        refs = self._history.visible if steps is None else _resolved(self._history, steps)
        self._refs = sorted(refs, key=lambda ref: (ref.term, ref.step))
        self._there, self._deleted = there.names, there.deleted

    def look(self) -> list[StepCopy]:
        """What there is to do, by names and sizes alone; nothing is written."""
        return [self._look(ref)[1] for ref in self._refs]

    def run(self, how: Copying) -> list[StepCopy]:
        """Copy: the claims of each term, then its steps, ascending; so a copy that ends early is resumed by the next.

        Raises CorruptCheckpointError for damage at the source, SupersededError for a destination that holds another
        history, StorageError, and DeadlineError when nothing moves any more. Whatever it raises, the destination shows
        whole steps only.
        """
        claimed, done = 0, []
        for ref in self._refs:
            copy_claims(self._source, self._destination, range(claimed + 1, ref.term + 1))
            claimed = max(claimed, ref.term)
            done.append(self._copy(ref, how))
        if self._all:
            copy_claims(self._source, self._destination, range(claimed + 1, self._history.newest_term + 1))
        return done

    def _look(self, ref: StepRef) -> tuple[Contents | None, StepCopy]:
        stored = read_step(self._destination, ref) if ref in self._there else None
        record = self._record(ref)
        if isinstance(stored, Tombstone) or ref in self._deleted:
            return None, StepCopy(ref.step, ref.term, "deleted there", record.counts.bytes, 0)
        contents = Contents.open(self._source, record)
        sizes = {data_key(ref.step, ref.term, row.rank): row.size for row in contents.files}
        found = {entry.key: entry.size for entry in self._destination.list(attempt_prefix(ref.step, ref.term))}
        missing = sum(size for key, size in sizes.items() if found.get(key) != size)
        there = not missing and is_same(self._destination, stored, record)
        outcome: Outcome = "there" if there else "to copy"
        return contents, StepCopy(ref.step, ref.term, outcome, sum(sizes.values()), missing)

    def _record(self, ref: StepRef) -> Record:
        record = self._history.resolve(ref.step)
        assert record is not None
        return record

    def _copy(self, ref: StepRef, how: Copying) -> StepCopy:
        contents, found = self._look(ref)
        if contents is None or found.outcome != "to copy":
            how.advance(found.nbytes)
            return found
        progress = _Progress(how, f"{self._destination.url}: step {ref.step}")
        blocks = stored_blocks(contents, range(len(contents.files)))
        jobs = [
            partial(copy_file, contents, row.rank, blocks[row.rank], self._destination, progress.moved)
            for row in contents.files
        ]
        side_by_side(jobs, how.threads, progress.check, "dscheck-copy")
        progress.moved(0)
        side_by_side([lambda _: finish(contents, self._destination)], 1, progress.check, "dscheck-copy")
        return StepCopy(ref.step, ref.term, "copied", found.nbytes, found.missing_bytes)


def _resolved(history: History, steps: Sequence[int]) -> list[StepRef]:
    records = [history.resolve(step) for step in dict.fromkeys(steps)]
    return [StepRef(record.step, record.term) for record in records if record is not None]


class _Progress:
    """When something has moved last. Any thread may use it."""

    def __init__(self, how: Copying, where: str) -> None:
        self._how, self._where = how, where
        self._last, self._bytes = time.monotonic(), 0

    def moved(self, nbytes: int) -> None:
        self._last = time.monotonic()
        self._bytes += nbytes
        self._how.advance(nbytes)

    def check(self) -> None:
        if time.monotonic() > self._last + self._how.patience_s:
            raise DeadlineError(
                f"{self._where}: nothing has moved for {self._how.patience_s:g} s, after {self._bytes} bytes; the "
                "storage hangs, or is out of reach: run it again, which does only what is missing",
                phase="copy",
                waited_for=self._where,
            )
