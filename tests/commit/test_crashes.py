"""C3: for each k, a crash after the k-th storage operation of a job leaves the old newest step or the new one.

A rollback has one more: the step that it went back to, from its claim on.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from dscheck.commit import StepRef, read_history
from dscheck.commit.gc import Collected, collect
from dscheck.commit.retention import Retention
from dscheck.config import Keep
from dscheck.errors import SupersededError
from dscheck.manifest.keys import plan_key
from dscheck.manifest.record import Record
from dscheck.storage import LocalStorage, MemoryStorage, Storage
from dscheck.testing.faults import ALL, MUTATING, Crash, Fault, Faulty, Lands, after, before, crash_after
from dscheck.testing.posix import Disk
from dscheck.testing.power import PowerCut
from tests.commit.jobs import Job, assert_complete


@dataclass(frozen=True)
class Move:
    """From which root a job starts, how, and what is newest before and after."""

    before: tuple[int, ...]
    step: int | None
    fresh: bool
    saves: int
    visible: tuple[int, ...]

    def set_up(self, root: Storage) -> StepRef | None:
        for step in self.before:
            Job.start(root).save(step)
        return read_history(root).newest

    def run(self, storage: Storage) -> None:
        Job.start(storage, step=self.step, fresh=self.fresh).save(self.saves)


MOVES = {
    "the first job": Move((), None, True, 100, (100,)),
    "a restart": Move((100,), None, False, 200, (100, 200)),
    "a rollback": Move((100, 150, 190), 100, False, 110, (100, 110)),
    "a fresh start": Move((100, 150), None, True, 10, (10,)),
}


def crashes(move: Move, lands: Lands, make: Callable[[], Storage]) -> Iterator[tuple[Storage, StepRef | None, bool]]:
    """For each k a root in which `move` crashed after k operations, its newest step before, and, last, without one."""
    for k in itertools.count():
        root = make()
        old = move.set_up(root)
        try:
            move.run(Faulty(root, crash_after(k, lands=lands, counted=ALL - {"write"} if k % 2 else ALL)))
        except Crash:
            yield root, old, False
        else:
            yield root, old, True
            return


def assert_old_or_new(root: Storage, move: Move, old: StepRef | None, finished: bool) -> None:
    history = read_history(root)
    newest, claimed = history.newest, history.newest_term > max(len(move.before), old.term if old else 0)
    if move.step is not None and claimed:
        old = StepRef(move.step, 1)
    assert newest == old or (newest is not None and newest.step == move.saves), f"neither old nor new: {newest}"
    assert newest != old or not finished
    for ref in history.visible:
        assert_complete(root, ref)


def assert_goes_on(root: Storage, move: Move) -> None:
    """The next job continues what is there, whatever the crashed one left."""
    kept = read_history(root).visible
    Job.start(root).save(1000)
    assert [ref.step for ref in read_history(root).visible] == [*(ref.step for ref in kept), 1000]


@pytest.mark.parametrize("lands", ["none", "half", "all"])
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())
def test_after_each_operation_the_newest_step_is_old_or_new(move: Move, lands: Lands) -> None:
    """commit P7, P16"""
    count = 0
    for root, old, finished in crashes(move, lands, MemoryStorage):
        assert_old_or_new(root, move, old, finished)
        if finished:
            assert tuple(ref.step for ref in read_history(root).visible) == move.visible
        assert_goes_on(root, move)
        count += 1
    assert count > 15


def test_on_a_local_disk_too(tmp_path: Path) -> None:
    """commit P7, P16"""
    move = MOVES["a rollback"]
    move.set_up(LocalStorage(tmp_path / "first"))
    numbers = itertools.count()

    def copied() -> Storage:
        return LocalStorage(shutil.copytree(tmp_path / "first", tmp_path / str(next(numbers))))

    for root, old, finished in crashes(replace(move, before=()), "half", copied):
        assert_old_or_new(root, move, old, finished)


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())
def test_a_power_cut_after_each_operation_leaves_old_or_new(move: Move) -> None:
    """commit P7: what a record names is durable before it."""
    for root, old, finished in crashes(move, "half", PowerCut):
        assert isinstance(root, PowerCut)
        for seed in range(3):
            assert_old_or_new(root.cut(seed), move, old, finished)


@pytest.mark.parametrize("hook", [before, after])
def test_a_second_job_at_any_operation_leaves_one_line_of_steps(hook: Callable[..., Fault]) -> None:
    """commit P10, P16: it runs start to end between two operations of the first; the newer claim of the two wins, and
    the other job loses one step at most, the one whose record came while the newer one looked.
    """
    found_late = 0
    for nth in itertools.count(1):
        root = MemoryStorage()
        Job.start(root).save(100)
        told, ran = interrupted(root, hook, nth)
        history = read_history(root)
        late = {StepRef(record.step, record.term) for record in told + ran} - set(history.visible)
        assert late <= {StepRef(record.step, record.term) for record in told[-1:] + ran[-1:]}
        assert all(ref.term < history.newest_term for ref in late)
        assert len(late) < 2
        found_late += len(late)
        for ref in (*history.visible, *history.abandoned):
            assert_complete(root, ref)
        if not ran:
            assert len(told) == 2
            break
    assert found_late


def interrupted(root: Storage, hook: Callable[..., Fault], nth: int) -> tuple[list[Record], list[Record]]:
    """What a job of two saves, and one that comes at its nth operation, acknowledge."""
    told: list[Record] = []
    ran: list[Record] = []
    try:
        job = Job.start(Faulty(root, hook(lambda op: ran.append(Job.start(root).save(200)), "*", nth=nth)))
        assert job.term.parent is not None
        for more in (1, 2):
            told.append(job.save(job.term.parent[1] + more))
    except SupersededError:
        assert ran
    return told, ran


def deletions(storage: Storage) -> None:
    """What retention and gc do in one root: keep two steps, collect an attempt, an old plan and an abandoned step."""
    terms = read_history(storage)
    Retention(storage, Keep(last=2)).run(terms.claim(terms.newest_term), (), by="retention", now=1e9)
    collect(storage, by="gc", now=1e9, abandoned=True)


def to_be_cleared(root: Storage) -> None:
    first = Job.start(root)
    for step in (100, 200, 300):
        first.save(step)
    first.write(400, 0)
    second = Job.start(root, step=200)
    for step in (210, 220):
        second.save(step)
    root.put_if_absent(plan_key(1, "ab" * 32), b"a plan of no step")


def assert_cleared_or_on_the_way(root: Storage) -> None:
    """The newest step is what it was, every step that shows is whole, and the next run finishes."""
    history = read_history(root)
    assert history.newest == StepRef(220, 2)
    assert [ref.step for ref in history.visible if ref.step > 200] == [210, 220]
    for ref in (*history.visible, *history.abandoned):
        assert_complete(root, ref)


@pytest.mark.parametrize("lands", ["none", "all"])
@pytest.mark.parametrize("make", [MemoryStorage, PowerCut], ids=["crash", "power cut"])
def test_after_each_operation_of_a_deletion_every_step_that_shows_is_whole(
    make: Callable[[], Storage], lands: Lands
) -> None:
    """commit P25, P26, and C3"""
    for k in itertools.count():
        root = make()
        to_be_cleared(root)
        try:
            deletions(Faulty(root, crash_after(k, lands=lands, counted=ALL if k % 2 else MUTATING)))
        except Crash:
            crashed = True
        else:
            crashed = False
        for left in [root.cut(seed) for seed in range(3)] if isinstance(root, PowerCut) else [root]:
            assert_cleared_or_on_the_way(left)
            deletions(left)
            assert_cleared_or_on_the_way(left)
            assert [
                entry.key for entry in left.list("steps/") if "/210/" not in entry.key if "/220/" not in entry.key
            ] == []
            assert collect(left, by="gc", now=1e9, abandoned=True) == Collected()
        if not crashed and k % 2:
            assert k > 15
            break


def test_a_power_cut_on_a_disk_after_each_call_of_a_deletion(tmp_path: Path) -> None:
    """commit P25, and C3: what the kernel has not synced yet, a cut may lose, in any order."""
    disk = Disk(str(tmp_path))
    with disk.recording():
        storage = LocalStorage(tmp_path / "run")
        to_be_cleared(storage)
        begun = len(disk.events)
        deletions(storage)
    for count in range(begun, len(disk.events) + 1):
        for seed in range(2):
            root = MemoryStorage()
            for path, data in disk.after_cut(random.Random(seed), disk.events[:count]).items():
                if not os.path.basename(path).startswith("."):
                    root.put_if_absent(path.removeprefix("run/"), data)
            assert_cleared_or_on_the_way(root)
