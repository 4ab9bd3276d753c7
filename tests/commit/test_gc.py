"""What gc deletes, what it never does, and over what it refuses to run."""

from __future__ import annotations

import pytest

from dscheck.commit import StepRef, read_history
from dscheck.commit.delete import delete_step
from dscheck.commit.gc import Collected, collect
from dscheck.commit.pins import pin
from dscheck.errors import CorruptCheckpointError, DscheckError, StorageError, SupersededError, UnsupportedFormatError
from dscheck.manifest.keys import data_key, plan_key, record_key
from dscheck.manifest.record import Tombstone, decode_record
from dscheck.manifest.text import seal
from dscheck.storage import MemoryStorage, Storage
from dscheck.testing.faults import Faulty, before, fail_at, lost_answer
from tests.commit.jobs import PLAN, Job, a_record, assert_complete


def gc(storage: Storage, **how: bool) -> Collected:
    return collect(storage, by="gc on a", now=1e9, **how)


def keys(storage: Storage) -> set[str]:
    return {entry.key for entry in storage.list("")}


def assert_sound(root: Storage) -> None:
    history = read_history(root)
    for ref in (*history.visible, *history.abandoned):
        assert_complete(root, ref)


def a_root() -> tuple[MemoryStorage, Job, Job]:
    """Term 1 committed 100 to 300 and failed at 400; term 2 went back to 200, committed 210 and is at 220."""
    root = MemoryStorage()
    old = Job.start(root)
    for step in (100, 200, 300):
        old.save(step)
    old.write(400, 0)
    new = Job.start(root, step=200)
    new.save(210)
    new.write(220, 0)
    return root, old, new


def test_an_attempt_of_an_older_term_is_given_up_and_goes_and_nothing_else() -> None:
    """commit P20, P21"""
    root, _, new = a_root()
    before = keys(root)
    found = gc(root)
    assert found == Collected(attempts=[StepRef(400, 1)], bytes=found.bytes)
    assert found.bytes > 0
    assert before - keys(root) == {data_key(400, 1, 0)}
    assert keys(root) - before == {record_key(400, 1)}
    assert isinstance(decode_record(root.read(record_key(400, 1)), record_key(400, 1)), Tombstone)
    assert_sound(root)
    new.write(220, 1)
    new.write(230, 0)


def test_an_attempt_under_way_in_the_newest_term_is_left_alone() -> None:
    """commit P20: a job that saves feels nothing of it."""
    root = MemoryStorage()
    job = Job.start(root)
    job.save(100)
    record = job.prepare(200)
    assert gc(root) == Collected()
    root.put_if_absent(record_key(200, 1), record.encode())
    assert_sound(root)


def test_the_job_whose_attempt_was_given_up_is_told_so() -> None:
    """commit P21, P22"""
    root = MemoryStorage()
    old = Job.start(root)
    old.save(100)
    old.prepare(200)
    Job.start(root).save(150)
    gc(root)
    with pytest.raises((SupersededError, StorageError)):
        old.save(300)
    assert [ref.step for ref in read_history(root).visible] == [100, 150]


def test_abandoned_steps_go_only_when_that_is_asked_for_and_pinned_ones_never() -> None:
    """commit P24, P25"""
    root, _, _ = a_root()
    assert gc(root).abandoned == []
    pin(root, read_history(root).record(StepRef(300, 1)), note="", by="me", now=1.0)
    assert gc(root, abandoned=True).abandoned == []
    root.delete("pins/300-1.json")
    storage = Faulty(root)
    assert gc(storage, abandoned=True).abandoned == [StepRef(300, 1)]
    changes = [op.key for op in storage.log if op.name in ("put_if_absent", "delete")]
    assert changes[:2] == ["records/300-1.deleted.json", "records/300-1.json"]
    history = read_history(root)
    assert (history.visible, history.abandoned) == ((StepRef(100, 1), StepRef(200, 1), StepRef(210, 2)), ())
    assert not list(root.list("steps/300/"))
    assert_sound(root)


def test_before_its_first_record_a_rollback_frees_nothing() -> None:
    """commit P24: the step it continues from may be deleted by a job that has not seen the claim."""
    root = MemoryStorage()
    old = Job.start(root)
    for step in (100, 200):
        old.save(step)
    new = Job.start(root, step=100)
    assert gc(root, abandoned=True).abandoned == []
    delete_step(root, read_history(root).record(StepRef(100, 1)), by="the old job", now=1.0)
    assert read_history(root).newest == StepRef(200, 1)
    new.save(110)
    assert gc(root, abandoned=True).abandoned == [StepRef(200, 1)]


def test_what_a_fresh_start_hides_stays_until_a_job_continues_it() -> None:
    """commit P24"""
    root = MemoryStorage()
    Job.start(root).save(100)
    Job.start(root, fresh=True).save(10)
    assert gc(root, abandoned=True).abandoned == []
    Job.start(root).save(20)
    assert gc(root, abandoned=True).abandoned == [StepRef(100, 1)]


def test_plans_go_when_no_step_names_them_and_their_term_is_over() -> None:
    """commit P25"""
    root = MemoryStorage()
    old = Job.start(root)
    old.save(100)
    root.put_if_absent(plan_key(1, "ab" * 32), b"a plan that was given up")
    new = Job.start(root, fresh=True)
    new.save(200)
    Job.start(root).save(300)
    root.put_if_absent(plan_key(3, "ab" * 32), b"a plan of a save under way")
    assert gc(root).plans == [plan_key(1, "ab" * 32)]
    assert gc(root, abandoned=True).plans == [plan_key(1, PLAN.head.sha256)]
    assert plan_key(3, "ab" * 32) in keys(root)
    assert_sound(root)


def test_what_a_deletion_left_behind_goes_in_any_term() -> None:
    """commit P25: a crash after the mark, and a late copy of the record's request."""
    root = MemoryStorage()
    job = Job.start(root)
    for step in (100, 200, 300):
        job.save(step)
    record = read_history(root).record(StepRef(200, 1))
    with pytest.raises(StorageError):
        delete_step(Faulty(root, fail_at("delete")), record, by="rm", now=1e9)
    delete_step(root, read_history(root).record(StepRef(100, 1)), by="rm", now=1e9)
    root.put_if_absent(record_key(100, 1), a_record(100, 1, job.term.id).encode())
    assert gc(root).deleted == [StepRef(100, 1), StepRef(200, 1)]
    assert not {key for key in keys(root) if key.startswith(("steps/100/", "steps/200/"))}
    assert record_key(100, 1) not in keys(root)
    assert gc(root) == Collected()


def test_marks_go_when_they_are_old_and_nothing_is_left() -> None:
    """commit P27"""
    root = MemoryStorage()
    job = Job.start(root)
    for step in (100, 200, 300):
        job.save(step)
    for step, time in ((100, 1e9 - 8 * 86400), (200, 1e9 - 6 * 86400)):
        delete_step(root, read_history(root).record(StepRef(step, 1)), by="rm", now=time)
    root.put_if_absent(record_key(100, 1), a_record(100, 1, job.term.id).encode())
    found = gc(root)
    assert (found.deleted, found.marks) == ([StepRef(100, 1)], [])
    assert gc(root).marks == [StepRef(100, 1)]
    assert {key for key in keys(root) if key.startswith("records/")} == {
        "records/200-1.deleted.json",
        "records/300-1.json",
    }


def test_a_dry_run_says_the_same_and_changes_nothing() -> None:
    root, _, _ = a_root()
    root.put_if_absent(plan_key(1, "ab" * 32), b"a plan that was given up")
    storage = Faulty(root)
    said = gc(storage, dry_run=True, abandoned=True)
    assert not [op for op in storage.log if op.name in ("put_if_absent", "create", "delete")]
    assert said == gc(root, abandoned=True)
    assert said.attempts
    assert said.abandoned
    assert said.plans


def test_it_ends_when_nobody_knows_whether_an_attempt_can_still_be_committed() -> None:
    """commit P23"""
    root, _, _ = a_root()
    held = keys(root)
    with pytest.raises(StorageError, match="not there"):
        gc(Faulty(root, fail_at("put_if_absent", "records/400-1.json")), abandoned=True)
    assert keys(root) == held
    found = gc(Faulty(root, lost_answer("records/400-1.json")), abandoned=True)
    assert found.attempts == [StepRef(400, 1)]


def test_an_attempt_that_is_committed_before_its_tombstone_stays() -> None:
    """commit P21"""
    root = MemoryStorage()
    old = Job.start(root)
    old.save(100)
    record = old.prepare(200)
    Job.start(root)
    late = before(lambda op: root.put_if_absent(record_key(200, 1), record.encode()), "put_if_absent", "records/*")
    assert gc(Faulty(root, late)) == Collected()
    assert read_history(root).abandoned == (StepRef(200, 1),)
    assert_sound(root)


@pytest.mark.parametrize(
    "key",
    [
        "terms/x.json",
        "records/300.json",
        "records/300-1.kept.json",
        "plans/1.arrow",
        "pins/300.json",
        "steps/300/1/data-0.bin.part",
        "steps/notes.txt",
        "steps/0300/1/data-0.bin",
    ],
)
def test_it_does_not_run_over_a_name_that_it_does_not_understand(key: str) -> None:
    """commit P19, P20: C15"""
    root, _, _ = a_root()
    root.put_if_absent(key, b"?")
    held = keys(root)
    with pytest.raises(CorruptCheckpointError, match="dscheck writes no object of this name"):
        gc(root, abandoned=True)
    assert keys(root) == held


@pytest.mark.parametrize("key", ["records/300-1.json", "terms/1.json", "records/100-1.deleted.json"])
@pytest.mark.parametrize("damage", ["newer", "damaged"])
def test_it_does_not_run_over_a_text_that_it_does_not_understand(key: str, damage: str) -> None:
    """commit P20: C15"""
    root, _, _ = a_root()
    root.delete(key)
    newer = seal({"version": 1, "requires": ["holds"], "kind": "record"})
    root.put_if_absent(key, newer if damage == "newer" else newer[:-9])
    held = keys(root)
    with pytest.raises(UnsupportedFormatError if damage == "newer" else CorruptCheckpointError):
        gc(root, abandoned=True)
    assert keys(root) == held


def test_other_folders_are_none_of_its_business() -> None:
    root, _, _ = a_root()
    root.put_if_absent("logs/train.txt", b"?")
    gc(root, abandoned=True)
    assert "logs/train.txt" in keys(root)


def test_an_empty_root_has_nothing_to_collect() -> None:
    assert gc(MemoryStorage(), abandoned=True) == Collected()


def test_two_at_once_do_each_other_no_harm() -> None:
    """At every operation of one another one runs from start to end."""
    for nth in range(1, 200):
        root, _, _ = a_root()
        ran: list[Collected] = []
        storage = Faulty(
            root, before(lambda op, root=root, ran=ran: ran.append(gc(root, abandoned=True)), "*", nth=nth)
        )
        try:
            gc(storage, abandoned=True)
        except DscheckError as error:  # what the other one deleted meanwhile
            raise AssertionError(f"at operation {nth}: {error}") from error
        assert_sound(root)
        assert [ref.step for ref in read_history(root).visible] == [100, 200, 210]
        assert gc(root, abandoned=True) == Collected()
        if not ran:
            break
    assert nth > 20
