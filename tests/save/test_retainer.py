"""`keep` beside a job: in the background, after a commit, and whatever it meets, no save fails or waits for it (C8)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dscheck import Checkpointer, ConfigError, Keep
from dscheck.commit import read_history
from dscheck.ranks.base import Ranks
from dscheck.testing.faults import Faulty, Operation, before, fail_at, hang, slow
from tests.end_to_end.worlds import fresh, job, open_on


def wait_for(done: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not done():
        assert time.monotonic() < until
        time.sleep(0.005)


def alone(root: Any, run: Callable[[Checkpointer], None], **settings: Any) -> None:
    def on(ranks: Ranks) -> None:
        with open_on(ranks, root, {"x": torch.ones(3)}, **settings) as ckpt:
            run(ckpt)

    job(1, on)


def saved(root: Any) -> list[int]:
    return [ref.step for ref in read_history(root).visible]


def test_what_falls_out_is_deleted_after_each_commit_and_metrics_are_in_the_record() -> None:
    """commit P26"""
    root = fresh()

    def run(ckpt: Checkpointer) -> None:
        for step, loss in ((1, 0.5), (2, 0.1), (3, 0.7), (4, float("nan")), (5, 0.2)):
            ckpt.save(step, metrics={"loss": loss, "lr": 1}).wait()
        wait_for(lambda: ckpt.retention.steps == 2)
        assert ckpt.steps() == [2, 4, 5]
        assert (ckpt.retention.failures, ckpt.retention.error) == (0, None)
        assert ckpt.retention.bytes > 0

    alone(root, run, keep=Keep(last=2, best=1, by="loss"))
    history = read_history(root)
    metrics = [dict(history.record(ref).metrics) for ref in history.visible]
    assert metrics == [{"loss": 0.1, "lr": 1.0}, {"loss": None, "lr": 1.0}, {"loss": 0.2, "lr": 1.0}]


def test_only_rank_0_deletes_and_close_waits_for_it() -> None:
    root = fresh()

    def run(ranks: Ranks) -> int:
        with open_on(ranks, Faulty(root, slow(0.03, "delete")), {"x": torch.ones(3)}, keep=1) as ckpt:
            for step in range(1, 6):
                ckpt.save(step).wait()
        return ckpt.retention.steps

    assert job(3, run) == [4, 0, 0]
    assert saved(root) == [5]


def test_a_job_that_was_started_again_goes_on_with_the_steps_of_before() -> None:
    root = fresh()
    alone(root, lambda ckpt: [ckpt.save(step).wait() for step in (1, 2, 3)] and None)

    def run(ckpt: Checkpointer) -> None:
        ckpt.load()
        ckpt.save(4).wait()

    alone(root, run, keep=2)
    assert saved(root) == [3, 4]


def test_nothing_is_deleted_before_the_step_that_replaces_it_is_committed() -> None:
    """commit P26"""
    root = fresh()
    deleted_at: list[list[int]] = []
    watched = before(lambda op: deleted_at.append(saved(root)), "put_if_absent", "*.deleted.json", times=None)

    def run(ckpt: Checkpointer) -> None:
        for step in (1, 2, 3):
            ckpt.save(step).wait()

    alone(Faulty(root, watched), run, keep=1)
    assert all(len(steps) >= 2 for steps in deleted_at)
    assert saved(root) == [3]


def test_a_save_that_fails_deletes_nothing() -> None:
    root = fresh()

    def run(ckpt: Checkpointer) -> None:
        ckpt.save(1).wait()
        assert ckpt.save(2).join(20)
        assert ckpt.steps() == [1]

    with pytest.warns(RuntimeWarning, match="step 2 failed"):
        alone(Faulty(root, fail_at("put_if_absent", "records/2-*")), run, keep=1)
    assert saved(root) == [1]


def test_a_deletion_that_fails_is_a_warning_and_a_number_and_is_tried_again() -> None:
    """C8"""
    root = fresh()
    refused = fail_at("delete", "records/1-*", times=2)

    def run(ckpt: Checkpointer) -> None:
        for number, step in enumerate((1, 2, 3, 4), 1):
            ckpt.save(step).wait()
            wait_for(lambda number=number: ckpt.retention.failures + (ckpt.retention.steps > 0) >= min(number - 1, 3))
        wait_for(lambda: ckpt.steps() == [4])
        assert ckpt.retention.failures == 2
        assert "StorageError: cannot delete 'records/1-1.json'" in str(ckpt.retention.error)

    with pytest.warns(RuntimeWarning, match="old steps could not be deleted, saves go on"):
        alone(Faulty(root, refused), run, keep=1)
    assert not list(root.list("steps/1/"))


def test_a_deletion_that_hangs_holds_up_no_save() -> None:
    """C8: and close goes on after a grace."""
    root, free = fresh(), threading.Event()

    def run(ckpt: Checkpointer) -> None:
        for step in (1, 2, 3, 4):
            ckpt.save(step).wait()
        assert ckpt.steps()[-1] == 4
        free.set()

    alone(Faulty(root, hang(free, "delete")), run, keep=1)
    assert saved(root) == [4]


def test_deleting_is_not_in_the_time_of_the_training_thread() -> None:
    threads: set[str] = set()

    def note(operation: Operation) -> None:
        threads.add(threading.current_thread().name.partition("_")[0])

    def run(ckpt: Checkpointer) -> None:
        for step in (1, 2, 3):
            ckpt.save(step).wait()

    alone(Faulty(fresh(), before(note, "delete", times=None)), run, keep=1)
    assert threads == {"dscheck-retain"}


def test_a_job_that_was_replaced_deletes_nothing_and_says_so_where_it_saves() -> None:
    """commit P26"""
    root = fresh()

    def run(ckpt: Checkpointer) -> None:
        for step in (1, 2):
            ckpt.save(step).wait()
        alone(root, lambda other: other.load(1) and other.save(5).wait())
        assert ckpt.save(3).join(20)
        assert ckpt.retention.steps == 0

    with pytest.warns(RuntimeWarning, match="another job has taken over"):
        alone(root, run, keep=2)
    assert saved(root) == [1, 5]


@pytest.mark.parametrize(
    "metrics",
    [
        3.0,
        [("loss", 1.0)],
        {"loss": "0.3"},
        {"loss": True},
        {"loss": torch.tensor(1.0)},
        {1: 1.0},
        {"": 1.0},
        {"x" * 101: 1.0},
        {str(number): 1.0 for number in range(101)},
    ],
    ids=str,
)
def test_metrics_that_are_no_numbers_are_refused_before_anything_is_captured(metrics: Any) -> None:
    """C8"""
    root = fresh()

    def run(ckpt: Checkpointer) -> None:
        with pytest.raises(ConfigError, match="metrics"):
            ckpt.save(1, metrics=metrics)
        ckpt.save(2, metrics={"loss": 0}).wait()

    alone(root, run)
    assert saved(root) == [2]
