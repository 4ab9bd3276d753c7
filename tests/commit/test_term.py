"""Claims: one winner, whatever gets lost; a root that cannot keep the promise is refused before the first byte."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dscheck import Checkpointer
from dscheck.commit import StepRef, assert_newest, claim, confirm, read_history
from dscheck.errors import CorruptCheckpointError, StorageError, SupersededError
from dscheck.manifest.keys import term_key
from dscheck.manifest.record import Term, decode_term
from dscheck.ranks import Solo
from dscheck.storage import LocalStorage, MemoryStorage, Storage
from dscheck.testing.faults import Faulty, Operation, Proceed, after, before, fail_at, lost_answer
from tests.commit.jobs import Job


def first(storage: Storage, host: str = "a") -> Term:
    return claim(storage, seen=0, parent=None, run=None, host=host, now=5.0)


@pytest.fixture(params=["memory", "local"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return MemoryStorage() if request.param == "memory" else LocalStorage(tmp_path / "run")


def test_a_job_claims_a_term_before_its_first_byte_and_a_load_writes_nothing() -> None:
    """commit P1, P7: claim, plan, data, files, record, in this order; and nothing else is ever written."""
    root = Faulty(MemoryStorage())
    for _ in range(2):
        with Checkpointer(root, {"n": 1}, ranks=Solo(), rng=False) as ckpt:
            assert ckpt.load() is None
    assert not root.count("put_if_absent") + root.count("create")
    with Checkpointer(root, {"n": 1}, ranks=Solo(), rng=False) as ckpt:
        ckpt.save(3).wait()
    made = [op.key for op in root.log if op.name in ("put_if_absent", "commit")]
    plan = next(iter(root.list("plans/"))).key
    claimed = ["terms/1.json", "terms/1.json"]
    assert made == [*claimed, plan, "steps/3/1/data-0.bin", "steps/3/1/files.arrow", "records/3-1.json"]


def test_a_claim_says_who_made_it_and_what_it_continues(root: Storage) -> None:
    """commit P1, P2: numbers without a gap, an id a claim, the first one's id for the run."""
    one = Job.start(root, host="one")
    one.save(100)
    two = Job.start(root, host="two").term
    assert (one.term.term, one.term.parent, one.term.run) == (1, None, one.term.id)
    assert (two.term, two.parent, two.run, two.host) == (2, (1, 100), one.term.id, "two")
    assert two.id != one.term.id
    assert decode_term(root.read("terms/2.json"), "terms/2.json") == two


def test_of_many_claims_at_once_one_wins_and_the_others_are_told_of_it(root: Storage) -> None:
    """commit P3: the losers' error has the winner's term, host and time."""
    start = threading.Barrier(8)
    found: list[Term | SupersededError] = []

    def run(number: int) -> None:
        start.wait()
        try:
            found.append(first(root, f"host-{number}"))
        except SupersededError as error:
            found.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [term for term in found if isinstance(term, Term)]
    losers = [error for error in found if isinstance(error, SupersededError)]
    assert len(losers) == 7
    for loser in losers:
        assert loser.fields == {"id": winner.id, "term": 1, "host": winner.host, "time": 5.0}
        assert winner.host in str(loser)
        assert pickle.loads(pickle.dumps(loser)).fields == loser.fields


def test_a_claim_whose_answer_was_lost_is_ours(root: Storage) -> None:
    """commit P3, and TRAPS 30: the object that was created decides, not the error."""
    term = first(Faulty(root, lost_answer("terms/*")))
    assert decode_term(root.read("terms/1.json"), "terms/1.json") == term


def test_a_lost_answer_to_a_lost_claim_names_the_winner(root: Storage) -> None:
    """commit P3: an error hides that another job was faster."""
    late = Faulty(root, before(lambda op: first(root, "winner"), "put_if_absent"), fail_at("put_if_absent"))
    with pytest.raises(SupersededError, match="winner"):
        first(late)


def test_a_claim_that_never_arrived_is_a_failure_and_is_not_sent_again(root: Storage) -> None:
    """commit P3: a second request under that id could win long after the job has gone on."""
    storage = Faulty(root, fail_at("put_if_absent", "terms/*"))
    with pytest.raises(StorageError, match=r"terms/1\.json"):
        first(storage)
    assert storage.count("put_if_absent") == 1
    assert first(storage).term == 1


def test_a_claim_that_cannot_be_read_back_is_a_failure(root: Storage) -> None:
    """commit P3"""
    storage = Faulty(root, lost_answer("terms/*"), fail_at("read", "terms/*"))
    with pytest.raises(StorageError, match="could not be read back"):
        first(storage)


def overwrite(operation: Operation, proceed: Proceed) -> object:
    """What a server does that ignores the condition."""
    if operation.name == "put_if_absent" and operation.key in WRITTEN:
        WRITTEN.clear()
        return True
    WRITTEN.append(operation.key)
    return proceed(operation)


WRITTEN: list[str] = []


def test_a_storage_that_lets_a_second_put_win_is_refused() -> None:
    """commit P4, and TRAPS 30."""
    WRITTEN.clear()
    with pytest.raises(StorageError, match="does not honour put-if-absent"):
        first(Faulty(MemoryStorage(), overwrite))


def test_a_storage_that_replaces_in_silence_is_refused() -> None:
    """commit P4: it says that the second put lost, and has its bytes all the same."""
    root = MemoryStorage()

    def replace(operation: Operation) -> None:
        text = root.read(operation.key)
        root.delete(operation.key)
        other = decode_term(text, operation.key)
        root.put_if_absent(operation.key, Term(1, "another", other.run, None, "b", 1.0).encode())

    with pytest.raises(StorageError, match="does not honour put-if-absent"):
        first(Faulty(root, after(replace, "put_if_absent", nth=2)))


def test_an_older_job_that_commits_does_not_stop_a_newer_claim() -> None:
    """commit P10, P16: neither before the claim nor after it; what came too late is abandoned, and its job stops."""
    root = MemoryStorage()
    old = Job.start(root, host="old")
    old.save(100)
    prepared = old.prepare(300)
    early = before(lambda op: old.save(200), "put_if_absent", "terms/2.json")
    late = after(lambda op: root.put_if_absent("records/300-1.json", prepared.encode()), "put_if_absent", nth=2)
    new = Job.start(Faulty(root, early, late), host="new")
    history = read_history(root)
    assert (new.term.parent, history.newest) == ((1, 100), StepRef(100, 1))
    assert history.abandoned == (StepRef(200, 1), StepRef(300, 1))
    with pytest.raises(SupersededError, match="'new'"):
        old.save(400)
    new.save(110)
    assert read_history(root).newest == StepRef(110, 2)


def test_a_rank_that_does_not_see_the_claim_refuses_its_root(tmp_path: Path) -> None:
    """commit P5, and TRAPS 32: each node's own disk as the root."""
    term = first(LocalStorage(tmp_path / "node-0"))
    confirm(LocalStorage(tmp_path / "node-0"), 1, term.id)
    with pytest.raises(StorageError, match=r"sees nothing.*own disk"):
        confirm(LocalStorage(tmp_path / "node-1"), 1, term.id)
    first(LocalStorage(tmp_path / "node-2"))
    with pytest.raises(StorageError, match=f"wrote the claim {term.id}"):
        confirm(LocalStorage(tmp_path / "node-2"), 1, term.id)


def test_the_newest_term_is_the_one_without_a_next_one(root: Storage) -> None:
    """commit P10"""
    old = first(root, "old")
    assert_newest(root, old)
    claim(root, seen=1, parent=None, run=old.run, host="new", now=7.0)
    with pytest.raises(SupersededError, match="term 2, claimed on host 'new'"):
        assert_newest(root, old)


def test_no_function_of_the_protocol_deletes_anything(root: Storage) -> None:
    """commit P6, P11: terms, tombstones and failed attempts stay."""
    storage = Faulty(root, lost_answer("records/*"), fail_at("put_if_absent", "records/*", nth=3))
    job = Job.start(storage)
    job.save(1)
    job.save(2)
    with pytest.raises(StorageError):
        job.save(3)
    Job.start(storage).save(3)
    assert not storage.count("delete")


def test_a_damaged_claim_is_not_taken_for_none(root: Storage) -> None:
    """commit P19: C15 for the check before a record."""
    term = first(root)
    root.put_if_absent(term_key(2), b"{}\n")
    with pytest.raises(CorruptCheckpointError, match=r"terms/2\.json"):
        assert_newest(root, term)


def test_claims_are_counted_by_what_was_seen() -> None:
    """commit P1: a job that saw less loses."""
    root = MemoryStorage()
    first(root)
    claims: list[Callable[[], Term]] = [lambda: first(root), lambda: Job.start(root).term]
    with pytest.raises(SupersededError):
        claims[0]()
    assert claims[1]().term == 2
