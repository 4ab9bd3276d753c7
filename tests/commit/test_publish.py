"""The record: created once, after everything that it names, and acknowledged only by the owner of the newest term."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from dscheck.commit import (
    StepRef,
    await_record,
    check_files,
    claim,
    publish,
    put_files,
    put_plan,
    read_history,
)
from dscheck.errors import ConfigError, CorruptCheckpointError, StorageError, SupersededError
from dscheck.manifest.arrow import EncodedPlan
from dscheck.manifest.record import Digest, Record, Tombstone
from dscheck.storage import LocalStorage, MemoryStorage, Storage
from dscheck.testing.faults import Faulty, before, fail_at, lost_answer
from tests.commit.jobs import Job, a_record, a_row, assert_complete


@pytest.fixture(params=["memory", "local"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return MemoryStorage() if request.param == "memory" else LocalStorage(tmp_path / "run")


def take_over(storage: Storage, seen: int = 1, parent: tuple[int, int] | None = None) -> None:
    claim(storage, seen=seen, parent=parent, run="run", host="new", now=7.0)


def bury(storage: Storage, step: int) -> None:
    storage.put_if_absent(f"records/{step}-1.json", Tombstone(step, 1, "gc on host c", 8.0).encode())


def test_a_step_exists_when_its_record_does(root: Storage) -> None:
    """commit P7, P11, P16: and not before."""
    job = Job.start(root)
    record = job.prepare(100)
    assert read_history(root).newest is None
    assert publish(root, record) == record
    assert read_history(root).newest == StepRef(100, 1)
    assert_complete(root, StepRef(100, 1))


def test_a_record_whose_answer_was_lost_is_committed(root: Storage) -> None:
    """commit P11, and TRAPS 30."""
    storage = Faulty(root, lost_answer("records/*"))
    record = Job.start(storage).save(100)
    assert read_history(root).record(StepRef(100, 1)).id == record.id
    assert storage.count("put_if_absent", "records/*") == 1


def test_a_record_that_did_not_arrive_fails_the_save_and_is_not_sent_again(root: Storage) -> None:
    """commit P11: the request may still be under way, so its data stays."""
    storage = Faulty(root, fail_at("put_if_absent", "records/*"))
    job = Job.start(storage)
    with pytest.raises(StorageError, match=r"records/100-1\.json"):
        job.save(100)
    assert storage.count("put_if_absent", "records/*") == 1
    assert len(list(root.list("steps/100/1/"))) == 3
    assert read_history(root).newest is None


def test_a_record_that_cannot_be_read_back_is_a_failure_that_says_so(root: Storage) -> None:
    """commit P11"""
    storage = Faulty(root, lost_answer("records/*"), fail_at("read", "records/*"))
    with pytest.raises(StorageError, match="could not be read back"):
        Job.start(storage).save(100)


def test_a_superseded_job_publishes_nothing(root: Storage) -> None:
    """commit P10"""
    job = Job.start(root)
    record = job.prepare(100)
    take_over(root)
    with pytest.raises(SupersededError, match="'new'"):
        publish(root, record)
    assert not list(root.list("records/"))


def test_a_job_whose_claim_is_gone_publishes_nothing(root: Storage) -> None:
    """commit P10: a root that was removed, or whose disk is no longer mounted."""
    record = Job.start(root).prepare(100)
    root.delete("terms/1.json")
    with pytest.raises(StorageError, match="sees nothing"):
        publish(root, record)
    assert not list(root.list("records/"))


def test_a_step_that_a_claim_came_between_is_abandoned_and_the_next_one_refused(root: Storage) -> None:
    """commit P10, P16: the check before the record saw no next term; the newer claim wins all the same."""
    Job.start(root).save(50)
    job = Job.start(Faulty(root, before(lambda op: take_over(root, 2, (1, 50)), "put_if_absent", "records/*")))
    assert job.save(100).step == 100
    history = read_history(root)
    assert (history.newest, history.abandoned) == (StepRef(50, 1), (StepRef(100, 2),))
    with pytest.raises(SupersededError, match="'new'"):
        job.save(150)


def test_a_tombstone_under_the_records_name_ends_the_attempt(root: Storage) -> None:
    """commit P11, P22: gc was faster."""
    storage = Faulty(root, before(lambda op: bury(root, 100), "put_if_absent", "records/*"))
    with pytest.raises(SupersededError, match="gc on host c"):
        Job.start(storage).save(100)
    assert read_history(root).newest is None


def test_a_second_try_in_one_term_is_refused(root: Storage) -> None:
    """commit P11, P12: the record of the first one is never replaced."""
    job = Job.start(root)
    first = job.save(100)
    other = a_record(100, 1, job.term.id, plan=first.plan, files=first.files)
    with pytest.raises(StorageError, match="tried once in a term"):
        publish(root, other)
    assert read_history(root).record(StepRef(100, 1)) == first


def test_a_second_try_in_the_next_term_replaces_nothing(root: Storage) -> None:
    """commit P12, P17: a request of the first try that lands late is shown no more."""
    root_with_fault = Faulty(root, fail_at("put_if_absent", "records/*"))
    first = Job.start(root)
    late = first.prepare(100)
    with pytest.raises(StorageError):
        publish(root_with_fault, late)
    Job.start(root).save(100)
    root.put_if_absent("records/100-1.json", late.encode())
    history = read_history(root)
    assert history.visible == (StepRef(100, 2),)
    assert history.abandoned == (StepRef(100, 1),)


def test_a_step_exceeds_the_one_that_its_term_continues(root: Storage) -> None:
    """commit P12: an acknowledged step 100 would be hidden by another one of its number."""
    Job.start(root).save(100)
    with pytest.raises(ConfigError, match="step 100 does not exceed step 100"):
        Job.start(root).save(100)
    assert read_history(root).newest == StepRef(100, 1)


def test_plan_and_files_may_be_there_already_when_they_are_equal(root: Storage) -> None:
    """commit P9, and TRAPS 37: two terms share no plan."""
    rows = EncodedPlan(b"head and rows", Digest(4, "5" * 64))
    one = put_plan(root, 1, rows)
    assert put_plan(root, 1, rows) == one == put_plan(root, 2, rows) == rows.head
    assert sorted(entry.key for entry in root.list("plans/")) == [f"plans/{n}-{one.sha256}.arrow" for n in (1, 2)]
    assert put_files(root, 3, 1, b"files") == put_files(root, 3, 1, b"files")
    with pytest.raises(StorageError, match="no object is ever overwritten"):
        put_files(root, 3, 1, b"other")
    assert root.read("steps/3/1/files.arrow") == b"files"


@pytest.mark.parametrize(
    "put",
    [
        lambda storage, data: put_plan(storage, 1, EncodedPlan(data, Digest(5, "5" * 64))),
        lambda storage, data: put_files(storage, 9, 1, data),
    ],
)
def test_a_lost_answer_to_a_plan_is_read_back(put: object) -> None:
    """commit P9"""
    assert callable(put)
    storage = Faulty(MemoryStorage(), lost_answer())
    digest = put(storage, b"bytes")
    assert digest.size == 5
    assert storage.count("put_if_absent") == 1


@pytest.mark.parametrize(
    ("sizes", "what"),
    [
        ({0: 4, 1: 5}, None),
        ({0: 4}, r"data-1\.bin: its rank wrote 5 bytes, the listing comes without it"),
        ({0: 4, 1: 3}, r"data-1\.bin: its rank wrote 5 bytes, the listing comes with 3 bytes"),
        ({0: 4, 1: 5, 2: 1}, r"data-2\.bin: no rank of this job wrote it"),
    ],
)
def test_every_data_file_must_be_in_the_listing_with_its_size(sizes: dict[int, int], what: str | None) -> None:
    """commit P8"""
    root = MemoryStorage()
    for rank, size in sizes.items():
        root.put_if_absent(f"steps/3/1/data-{rank}.bin", b"x" * size)
    root.put_if_absent("steps/3/1/files.arrow", b"of an earlier look")
    root.put_if_absent("steps/3/10/data-0.bin", b"of another term")
    rows = [a_row(0, 4), a_row(1, 5)]
    if what is None:
        check_files(root, 3, 1, rows)
        return
    with pytest.raises(StorageError, match=what) as raised:
        check_files(root, 3, 1, rows)
    assert "step 3 is not committed" in str(raised.value)
    assert raised.value.fields["key"].startswith("steps/3/1/data-")


def test_a_rank_without_an_answer_reads_the_record(root: Storage) -> None:
    """commit P13: committed, not committed, given up, or another's."""
    job = Job.start(root)
    assert not await_record(root, 100, 1, "some id")
    record = job.save(100)
    assert await_record(root, 100, 1, record.id)
    with pytest.raises(CorruptCheckpointError, match="another attempt"):
        await_record(root, 100, 1, "another id")
    bury(root, 200)
    with pytest.raises(SupersededError, match="given up by gc"):
        await_record(root, 200, 1, "some id")
    take_over(root)
    assert await_record(root, 100, 1, record.id)


def test_a_rank_may_wait_for_a_record_until_its_deadline() -> None:
    """commit P13: and no longer."""
    root = MemoryStorage()
    job = Job.start(root)
    record: Record = job.prepare(100)
    began = time.monotonic()
    assert not await_record(root, 100, 1, record.id, deadline=began + 0.05, poll_s=0.01)
    assert 0.05 <= time.monotonic() - began < 5
    timer = threading.Timer(0.05, publish, (root, record))
    timer.start()
    assert await_record(root, 100, 1, record.id, deadline=time.monotonic() + 30, poll_s=0.01)
    timer.join()
