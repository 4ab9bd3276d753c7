"""A job without tensors: it claims, writes data files of known content, and publishes, as rank 0 of a real one does."""

from __future__ import annotations

import hashlib
import uuid
from dataclasses import dataclass

from dscheck.commit import StepRef, check_files, claim, publish, put_files, put_plan, read_history
from dscheck.manifest.arrow import EncodedPlan
from dscheck.manifest.files import Extent, FileRow
from dscheck.manifest.keys import data_key, files_key, plan_key
from dscheck.manifest.record import Counts, Digest, Record, Term
from dscheck.storage.base import Storage

RANKS = 2
PLAN = EncodedPlan(b"the plan", Digest(8, hashlib.sha256(b"the plan").hexdigest()))
NOTHING = Digest(0, "0" * 64)


@dataclass
class Job:
    """One term's owner, writing through `storage`."""

    storage: Storage
    term: Term

    @classmethod
    def start(cls, storage: Storage, *, step: int | None = None, fresh: bool = False, host: str = "a") -> Job:
        """Continue from `step` (None: the newest), or from nothing, and claim a term."""
        history = read_history(storage)
        found = None if fresh else history.resolve(step)
        parent = None if found is None else (found.term, found.step)
        term = claim(storage, seen=history.newest_term, parent=parent, run=history.run, host=host, now=1e9)
        return cls(storage, term)

    def prepare(self, step: int) -> Record:
        """All that the record of `step` names is there."""
        plan = put_plan(self.storage, self.term.term, PLAN)
        rows = [self.write(step, rank) for rank in range(RANKS)]
        check_files(self.storage, step, self.term.term, rows)
        files = put_files(self.storage, step, self.term.term, file_list(step, self.term.term))
        return a_record(step, self.term.term, self.term.id, plan=plan, files=files)

    def write(self, step: int, rank: int) -> FileRow:
        data = content(step, self.term.term, rank)
        writer = self.storage.create(data_key(step, self.term.term, rank))
        writer.write(data)
        return a_row(rank, writer.commit())

    def save(self, step: int) -> Record:
        return publish(self.storage, self.prepare(step))


def content(step: int, term: int, rank: int) -> bytes:
    return f"step {step} of term {term}, rank {rank}. ".encode() * 9


def file_list(step: int, term: int) -> bytes:
    return f"the files of step {step} of term {term}".encode()


def a_row(rank: int, size: int) -> FileRow:
    nothing = Extent(0, 0, "0" * 64)
    return FileRow(rank, size, 0, nothing, nothing, nothing)


def a_record(
    step: int,
    term: int,
    term_id: str,
    *,
    plan: Digest = NOTHING,
    files: Digest = NOTHING,
    id: str | None = None,
) -> Record:
    counts = Counts(tensors=1, fragments=1, ranks=RANKS, blocks=1, bytes=8)
    return Record(step, term, term_id, plan, files, counts, {}, 1.0, 2.0, id or uuid.uuid4().hex)


def a_term(number: int, parent: tuple[int, int] | None = None) -> Term:
    return Term(number, f"id-{number}", "id-1", parent, f"host-{number}", 1e9)


def assert_complete(storage: Storage, ref: StepRef) -> None:
    """Every byte that the step's record names is there, as its own term wrote it."""
    record = read_history(storage).record(ref)
    assert storage.read(plan_key(ref.term, record.plan.sha256)) == PLAN.data
    assert storage.read(files_key(ref.step, ref.term)) == file_list(ref.step, ref.term)
    for rank in range(RANKS):
        assert storage.read(data_key(ref.step, ref.term, rank)) == content(ref.step, ref.term, rank)
