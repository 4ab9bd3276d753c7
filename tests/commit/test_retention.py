"""What `keep` chooses, what its deletion does step by step, and what it never touches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dscheck.commit import StepRef, await_record, read_history
from dscheck.commit.delete import delete_step
from dscheck.commit.pins import pin, pinned, read_pin, unpin
from dscheck.commit.retention import Deleted, Retention, falls_out
from dscheck.config import Keep
from dscheck.errors import CheckpointNotFoundError, ConfigError, CorruptCheckpointError, StorageError, SupersededError
from dscheck.manifest.record import Record
from dscheck.storage import MemoryStorage, Storage
from dscheck.testing.faults import Faulty, before, fail_at, lost_answer
from tests.commit.jobs import Job, a_record, assert_complete


def records(*steps: int, **metrics: list[float | None]) -> list[Record]:
    """Steps of one term, each with its value of every metric."""
    return [
        replace(a_record(step, 1, "id-1"), metrics={name: values[number] for name, values in metrics.items()})
        for number, step in enumerate(steps)
    ]


def kept(keep: Keep, found: list[Record], *pins: int) -> list[int]:
    out = falls_out(keep, found, {StepRef(step, 1) for step in pins})
    return [record.step for record in found if record not in out]


def apply(storage: Storage, job: Job, keep: Keep) -> Deleted:
    return Retention(storage, keep).run(job.term, (), by="retention on a", now=1e9)


def visible(storage: Storage) -> list[int]:
    return [ref.step for ref in read_history(storage).visible]


def test_the_last_ones_every_so_many_the_best_and_pinned_ones_stay() -> None:
    """commit P26"""
    found = records(10, 20, 30, 40, 50, 60, 70, loss=[5.0, 1.0, 3.0, 2.0, 2.0, 9.0, 8.0])
    assert kept(Keep(last=2), found) == [60, 70]
    assert kept(Keep(last=1, every=30), found) == [30, 60, 70]
    assert kept(Keep(last=1, best=2, by="loss"), found) == [20, 50, 70]
    assert kept(Keep(last=1, best=1, by="loss", mode="max"), found) == [60, 70]
    assert kept(Keep(last=1), found, 10, 40) == [10, 40, 70]
    assert kept(Keep(last=9), found) == [10, 20, 30, 40, 50, 60, 70]


def test_a_step_without_the_metric_or_with_one_that_was_not_finite_is_never_among_the_best() -> None:
    found = records(1, 2, 3, 4, loss=[None, 5.0, None, 6.0])
    assert kept(Keep(best=3, by="loss"), found) == [2, 4]
    assert kept(Keep(best=3, by="accuracy"), found) == [4]


@given(st.data())
def test_against_the_definition(data: st.DataObject) -> None:
    """Each rule by itself, and what any of them keeps is kept; the newest always is."""
    steps = sorted(data.draw(st.sets(st.integers(0, 60), min_size=1, max_size=12)))
    values = data.draw(st.lists(st.none() | st.sampled_from([0.0, 1.0, 2.0]), min_size=len(steps), max_size=len(steps)))
    found = records(*steps, m=values)
    keep = Keep(data.draw(st.integers(1, 4)), data.draw(st.none() | st.integers(1, 9)), 2, "m", "max")
    pins = data.draw(st.sets(st.sampled_from(steps)))
    ranked = sorted((s for s, v in zip(steps, values, strict=True) if v is not None), reverse=True)
    ranked.sort(key=lambda s: values[steps.index(s)] or 0.0, reverse=True)
    every = {step for step in steps if keep.every and step % keep.every == 0}
    assert set(kept(keep, found, *pins)) == {*steps[-keep.last :], *every, *ranked[:2], *pins}


@pytest.mark.parametrize(
    "wrong",
    [
        {"last": 0},
        {"last": True},
        {"last": 2.0},
        {"every": 0},
        {"every": "10"},
        {"best": -1, "by": "loss"},
        {"best": 2},
        {"by": "loss"},
        {"best": 1, "by": ""},
        {"best": 1, "by": "loss", "mode": "least"},
    ],
)
def test_a_rule_that_says_nothing_sensible_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="keep: "):
        Keep(**wrong)


def test_a_deletion_is_a_mark_then_the_record_then_the_data() -> None:
    """commit P25, P26: and plans stay."""
    root = MemoryStorage()
    job = Job.start(root)
    for step in (100, 200, 300):
        job.save(step)
    storage = Faulty(root)
    deleted = apply(storage, job, Keep(last=2))
    assert deleted.steps == (StepRef(100, 1),)
    assert deleted.bytes > 0
    changes = [(op.name, op.key) for op in storage.log if op.name in ("put_if_absent", "delete")]
    assert changes[:2] == [("put_if_absent", "records/100-1.deleted.json"), ("delete", "records/100-1.json")]
    assert {key for _, key in changes[2:]} == {
        "steps/100/1/data-0.bin",
        "steps/100/1/data-1.bin",
        "steps/100/1/files.arrow",
    }
    assert visible(root) == [200, 300]
    for ref in read_history(root).visible:
        assert_complete(root, ref)


def test_steps_of_earlier_terms_of_the_lineage_fall_out_and_abandoned_ones_do_not() -> None:
    """commit P26: a job deletes only what is of its own lineage."""
    root = MemoryStorage()
    first = Job.start(root)
    for step in (100, 200, 300):
        first.save(step)
    second = Job.start(root, step=200)
    second.save(210)
    apply(root, second, Keep(last=1))
    history = read_history(root)
    assert history.visible == (StepRef(210, 2),)
    assert history.abandoned == (StepRef(300, 1),)
    assert_complete(root, StepRef(300, 1))


def test_a_job_that_was_replaced_deletes_nothing_more() -> None:
    """commit P26"""
    root = MemoryStorage()
    old = Job.start(root)
    for step in (100, 200, 300):
        old.save(step)
    claimed = before(lambda op: Job.start(root, step=200), "read", "terms/2.json", nth=2)
    with pytest.raises(SupersededError):
        apply(Faulty(root, claimed), old, Keep(last=1))
    history = read_history(root)
    assert history.visible == (StepRef(200, 1),)
    assert history.abandoned == (StepRef(300, 1),)


def test_a_claim_whose_step_is_deleted_hides_nothing_until_its_first_record() -> None:
    """commit P16, P26: whoever deleted it had not seen the claim; the root always has a newest step."""
    root = MemoryStorage()
    old = Job.start(root)
    old.save(100)
    newer = Job.start(root)
    record = old.prepare(200)
    root.put_if_absent("records/200-1.json", record.encode())
    assert read_history(root).newest == StepRef(100, 1)
    delete_step(root, read_history(root).record(StepRef(100, 1)), by="an old job", now=1.0)
    assert read_history(root).newest == StepRef(200, 1)
    newer.save(110)
    assert read_history(root).visible == (StepRef(110, 2),)


def test_a_late_copy_of_the_request_that_committed_it_brings_no_step_back() -> None:
    """commit P25"""
    root = MemoryStorage()
    job = Job.start(root)
    record = job.save(100)
    job.save(200)
    apply(root, job, Keep(last=1))
    root.put_if_absent("records/100-1.json", record.encode())
    history = read_history(root)
    assert (history.visible, history.abandoned) == ((StepRef(200, 1),), ())
    with pytest.raises(CheckpointNotFoundError, match="step 100 was deleted; committed are 200"):
        history.resolve(100)


def test_nothing_goes_while_nobody_knows_whether_the_mark_is_there() -> None:
    """commit P23, P25"""
    root = MemoryStorage()
    job = Job.start(root)
    for step in (100, 200):
        job.save(step)
    with pytest.raises(StorageError):
        apply(Faulty(root, fail_at("put_if_absent", "*.deleted.json")), job, Keep(last=1))
    assert visible(root) == [100, 200]
    assert_complete(root, StepRef(100, 1))
    apply(Faulty(root, lost_answer("*.deleted.json")), job, Keep(last=1))
    assert visible(root) == [200]


def test_what_one_run_left_the_next_one_deletes() -> None:
    root = MemoryStorage()
    job = Job.start(root)
    for step in (100, 200):
        job.save(step)
    retention = Retention(Faulty(root, fail_at("delete", "steps/100/*")), Keep(last=1))
    with pytest.raises(StorageError):
        retention.run(job.term, (), by="a", now=1.0)
    assert visible(root) == [200]
    assert list(root.list("steps/100/"))
    retention.run(job.term, (), by="a", now=1.0)
    assert not list(root.list("steps/100/"))


def test_a_term_is_listed_once_however_many_steps_it_deletes() -> None:
    """A root of a long job holds a mark for each step that was deleted: to list them at each save would be felt."""
    root = MemoryStorage()
    job = Job.start(root)
    storage = Faulty(root)
    retention = Retention(storage, Keep(last=2))
    for step in range(100, 110):
        retention.run(job.term, [job.save(step)], by="a", now=1.0)
    assert visible(root) == [108, 109]
    assert storage.count("list", "records/") == 1
    assert storage.count("read", "records/*") == 1
    later = Job.start(root, step=108)
    later.save(200)
    retention.run(later.term, (), by="a", now=1.0)
    assert visible(root) == [108, 200]
    assert storage.count("list", "records/") == 2


def test_a_step_that_somebody_else_deleted_is_no_error() -> None:
    root = MemoryStorage()
    job = Job.start(root)
    retention = Retention(root, Keep(last=2))
    for step in (100, 200):
        retention.run(job.term, [job.save(step)], by="a", now=1.0)
    delete_step(root, read_history(root).record(StepRef(100, 1)), by="rm", now=1.0)
    retention.run(job.term, [job.save(300)], by="a", now=1.0)
    assert visible(root) == [200, 300]


def test_a_rank_that_is_late_learns_that_its_step_was_committed_although_it_is_deleted_by_now() -> None:
    """commit P13, P25"""
    root = MemoryStorage()
    job = Job.start(root)
    record = job.save(100)
    job.save(200)
    apply(root, job, Keep(last=1))
    assert await_record(root, 100, 1, record.id)
    assert not await_record(root, 100, 1, "another try")


def test_pins_are_found_read_and_removed() -> None:
    """format F109, F110"""
    root = MemoryStorage()
    job = Job.start(root)
    record = job.save(100)
    first = pin(root, record, note="the paper's", by="me", now=5.0)
    assert pin(root, record, note="another", by="you", now=6.0) == first == read_pin(root, StepRef(100, 1))
    assert pinned(root) == {StepRef(100, 1)}
    job.save(200)
    assert apply(root, job, Keep(last=1)).steps == ()
    unpin(root, StepRef(100, 1))
    assert apply(root, job, Keep(last=1)).steps == (StepRef(100, 1),)


def test_a_name_among_the_pins_that_is_not_ours_is_damage() -> None:
    """commit P19: nothing is deleted by who does not understand what is to stay."""
    root = MemoryStorage()
    job = Job.start(root)
    for step in (100, 200):
        job.save(step)
    root.put_if_absent("pins/everything.json", b"{}")
    with pytest.raises(CorruptCheckpointError, match=r"pins/everything\.json"):
        apply(root, job, Keep(last=1))
    assert visible(root) == [100, 200]
