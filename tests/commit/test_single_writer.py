"""A store without put-if-absent: refused, unless a job says that it writes alone; what is lost then, what is not."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable

import pytest
import torch

from dscheck import Checkpointer, NoConditionError, StorageError, SupersededError
from dscheck.commit import SingleWriter, confirm, read_history
from dscheck.manifest.record import decode_term
from dscheck.ranks import Solo
from dscheck.storage import MemoryStorage, Storage
from dscheck.testing import Crash, Faulty, Unconditional, crash_after, fail_at, lost_answer
from dscheck.testing.faults import ALL, Lands
from tests.commit.jobs import Job, assert_complete
from tests.commit.test_crashes import MOVES, Move, assert_goes_on, assert_old_or_new


def keys(root: Storage) -> dict[str, bytes]:
    return {entry.key: root.read(entry.key) for entry in root.list("")}


def saved(root: Storage, step: int, **settings: object) -> None:
    with Checkpointer(root, {"x": torch.ones(3)}, ranks=Solo(), rng=False, **settings) as ckpt:
        ckpt.load()
        ckpt.save(step).wait()


@pytest.mark.filterwarnings("ignore:dscheck:RuntimeWarning")
def test_a_store_without_condition_is_refused_and_the_error_says_what_to_choose_and_what_it_costs() -> None:
    """commit P28, P4"""
    root = Unconditional(MemoryStorage())
    saved(root, 1, commit="single-writer")
    before = keys(root)
    with pytest.raises(NoConditionError, match="does not honour put-if-absent") as caught:
        saved(root, 2)
    assert 'commit="single-writer"' in str(caught.value)
    assert "two jobs at once may both believe that they own a term" in str(caught.value)
    assert pickle.loads(pickle.dumps(caught.value)).fields == caught.value.fields
    assert keys(root).items() >= before.items()
    saved(root, 2, commit="single-writer")
    assert [ref.step for ref in read_history(root).visible] == [1, 2]


class Telling(Unconditional):
    """One that knows by itself."""

    def lacks_condition(self) -> str | None:
        return "this store looks first, and writes then"


@pytest.mark.filterwarnings("ignore:dscheck:RuntimeWarning")
def test_a_store_that_knows_is_refused_before_anything_is_put() -> None:
    """commit P28"""
    root = Faulty(MemoryStorage())
    with pytest.raises(NoConditionError, match="this store looks first, and writes then"):
        saved(Telling(root), 1)
    assert not root.count("put_if_absent")
    saved(Telling(root), 1, commit="single-writer")
    assert read_history(root).newest is not None


def test_a_look_comes_before_each_put_and_nothing_is_put_where_something_is() -> None:
    """commit P29"""
    inner = Faulty(MemoryStorage())
    root = SingleWriter(Unconditional(inner))
    assert root.put_if_absent("records/1-1.json", b"first") is True
    assert root.put_if_absent("records/1-1.json", b"second") is False
    assert inner.read("records/1-1.json") == b"first"
    assert inner.count("put_if_absent") == 1


def test_a_look_that_fails_is_no_leave_to_put() -> None:
    """commit P29: unknown is not absent (C15)."""
    inner = Faulty(MemoryStorage(), fail_at("read"))
    with pytest.raises(StorageError):
        SingleWriter(inner).put_if_absent("records/1-1.json", b"x")
    assert not inner.count("put_if_absent")


def test_a_condition_that_is_there_after_all_decides() -> None:
    """commit P29"""
    inner = MemoryStorage()
    late = RivalBetween(inner, lambda: inner.put_if_absent("terms/1.json", b"rival"))
    assert SingleWriter(late).put_if_absent("terms/1.json", b"mine") is False
    assert inner.read("terms/1.json") == b"rival"


@pytest.mark.parametrize("key", ["terms/*", "plans/*", "steps/*/files.arrow", "records/*"])
def test_a_lost_answer_is_read_back(key: str) -> None:
    """commit P29, P3, P11, and TRAPS 30: our own id means success."""
    root = Unconditional(MemoryStorage())
    storage = SingleWriter(Faulty(root, lost_answer(key)))
    if key == "terms/*":
        job = Job.start(storage)
        assert decode_term(root.read("terms/1.json"), "terms/1.json") == job.term
        job.save(1)
    else:
        Job.start(storage).save(1)
    newest = read_history(root).newest
    assert newest is not None
    assert_complete(root, newest)


def test_of_two_jobs_that_claim_at_once_both_believe_in_the_term_and_one_commits() -> None:
    """commit P30: that is what is lost."""
    root = Unconditional(MemoryStorage())
    jobs: list[Job] = []

    def rival() -> None:
        jobs.append(Job.start(SingleWriter(root), host="rival"))

    # The rival claims when this job has looked, and before it puts.
    jobs.append(Job.start(SingleWriter(RivalBetween(root, rival)), host="slow"))
    other, mine = jobs
    assert (other.term.term, mine.term.term) == (1, 1)
    assert other.term.id != mine.term.id
    with pytest.raises(StorageError, match="this process sees"):
        confirm(root, other.term.term, other.term.id)
    with pytest.raises(StorageError, match="this process sees"):
        other.save(5)
    mine.save(6)
    history = read_history(root)
    assert [ref.step for ref in history.visible] == [6]
    assert_complete(root, history.visible[0])


class RivalBetween(Faulty):
    """Lets `rival` act between the first look and the put after it."""

    def __init__(self, storage: Storage, rival: Callable[[], object]) -> None:
        super().__init__(storage)
        self.rivals = [rival]

    def put_if_absent(self, key: str, data: bytes) -> bool:
        while self.rivals:
            self.rivals.pop()()
        return super().put_if_absent(key, data)


def test_a_job_that_was_superseded_stops_here_too() -> None:
    """commit P29: of two that do not claim at once the newer one wins, as everywhere."""
    root = SingleWriter(Unconditional(MemoryStorage()))
    old = Job.start(root)
    old.save(1)
    Job.start(root, host="newer")
    with pytest.raises(SupersededError, match="newer"):
        old.save(2)


@pytest.mark.parametrize("lands", ["none", "half", "all"])
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())
def test_a_crash_at_any_operation_leaves_old_or_new(move: Move, lands: Lands) -> None:
    """commit P31"""
    for k in itertools.count():
        root = Unconditional(MemoryStorage())
        committing = SingleWriter(root)
        old = move.set_up(committing)
        try:
            move.run(SingleWriter(Faulty(root, crash_after(k, lands=lands, counted=ALL))))
        except Crash:
            assert_old_or_new(root, move, old, finished=False)
            assert_goes_on(committing, move)
        else:
            assert_old_or_new(root, move, old, finished=True)
            break
    assert k > 20
