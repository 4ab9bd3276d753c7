"""Copies between roots: whole or not there, after a crash at any operation, whatever was there before."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dscheck import sharded
from dscheck.commit import StepRef, read_history
from dscheck.commit.contents import Contents
from dscheck.commit.copy import Copying, CopyPlan, StepCopy
from dscheck.commit.delete import delete_step
from dscheck.commit.single_writer import SingleWriter
from dscheck.commit.transfer import finish
from dscheck.commit.verify import verify
from dscheck.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    DeadlineError,
    NoConditionError,
    StorageError,
    SupersededError,
)
from dscheck.manifest.keys import record_key, term_key
from dscheck.manifest.record import Tombstone
from dscheck.ranks.base import Ranks
from dscheck.storage import LocalStorage, MemoryStorage, Storage
from dscheck.testing.faults import (
    ALL,
    Crash,
    Fault,
    Faulty,
    Lands,
    before,
    crash_after,
    fail_at,
    hang,
    lost_answer,
    slow,
)
from tests.end_to_end.worlds import job, load, open_on, save

BLOCK_BYTES = 4096
ONE_THREAD = Copying(threads=1, patience_s=20.0)


def saved(*, numel: int = 3000) -> Storage:
    """A root of two ranks: steps 1 and 2 of term 1, then a rollback to 1 and step 3 of term 2."""
    root = MemoryStorage()

    def run(ranks: Ranks) -> None:
        local = torch.arange(numel, dtype=torch.float32) + ranks.rank
        state = {"w": sharded(local, (2 * numel,), (numel * ranks.rank,)), "b": torch.ones(3), "n": 7}
        with open_on(ranks, root, state, block_bytes=BLOCK_BYTES) as ckpt:
            ckpt.save(1).wait()
            local += 1
            ckpt.save(2).wait()
            ckpt.load(1)
            ckpt.save(3).wait()

    job(2, run)
    return root


@pytest.fixture(scope="module")
def source() -> Storage:
    return saved()


def copied(source: Storage, to: Storage, *steps: int, how: Copying = ONE_THREAD) -> list[StepCopy]:
    return CopyPlan(source, to, steps or None).run(how)


def objects(storage: Storage) -> dict[str, bytes]:
    return {entry.key: storage.read(entry.key) for entry in storage.list("")}


def assert_whole(root: Storage) -> tuple[int, ...]:
    """Every step that shows is undamaged; which ones show."""
    history = read_history(root)
    for ref in history.visible:
        record = history.resolve(ref.step)
        assert record is not None
        assert not [*verify(Contents.open(root, record), lambda nbytes: None)]
    return tuple(ref.step for ref in history.visible)


def test_a_copy_is_loaded_like_the_original(source: Storage) -> None:
    """commit P33"""
    to = MemoryStorage()
    outcomes = copied(source, to)
    assert [(step.step, step.term, step.outcome) for step in outcomes] == [(1, 1, "copied"), (3, 2, "copied")]
    state = {"w": torch.zeros(6000), "b": torch.zeros(3), "n": 0}
    load(to, [state])
    assert state["n"] == 7
    assert torch.equal(state["w"], torch.cat([torch.arange(3000.0), torch.arange(3000.0) + 1]))
    assert read_history(to).newest == StepRef(3, 2)


def test_the_copy_is_a_root_on_which_a_job_goes_on(source: Storage) -> None:
    to = MemoryStorage()
    copied(source, to)
    state = {"w": torch.zeros(6000), "b": torch.zeros(3), "n": 0}

    def run(ranks: Ranks) -> None:
        with open_on(ranks, to, state) as ckpt:
            ckpt.load()
            ckpt.save(4).wait()

    job(1, run)
    assert assert_whole(to) == (1, 3, 4)


def test_one_step_comes_with_the_claims_up_to_its_term_only(source: Storage) -> None:
    to = MemoryStorage()
    copied(source, to, 1)
    assert assert_whole(to) == (1,)
    assert read_history(to).newest_term == 1
    copied(source, to)
    assert assert_whole(to) == (1, 3)


def test_an_older_step_may_follow_a_newer_one(source: Storage) -> None:
    """commit P32"""
    to = MemoryStorage()
    copied(source, to, 3)
    copied(source, to, 1)
    assert assert_whole(to) == (1, 3)


def test_a_step_outside_of_the_live_history_is_refused_by_name(source: Storage) -> None:
    with pytest.raises(CheckpointNotFoundError, match="step 2 was committed by term 1, on a branch that was abandoned"):
        CopyPlan(source, MemoryStorage(), [2])


def test_a_second_copy_writes_nothing(source: Storage) -> None:
    """commit P33"""
    to = MemoryStorage()
    copied(source, to)
    watched = Faulty(to)
    assert {step.outcome for step in copied(source, watched)} == {"there"}
    assert not [op for op in watched.log if op.name in ("put_if_absent", "create", "delete")]


def test_a_rollback_at_the_source_takes_effect_at_the_copy(source: Storage) -> None:
    root, to = MemoryStorage(), MemoryStorage()
    state = {"w": torch.ones(10)}
    save(root, 1, [state])
    save(root, 2, [state])  # a fresh start, of a job that has seen step 1
    copied(root, to)
    assert read_history(to).visible == read_history(root).visible


@pytest.mark.parametrize("lands", ["none", "half", "all"])
def test_a_crash_after_each_operation_leaves_whole_steps_and_the_next_copy_ends_it(
    source: Storage, lands: Lands
) -> None:
    """commit P32, P33: C1 and C3 at the destination."""
    for count in itertools.count():
        to = MemoryStorage()
        try:
            copied(source, Faulty(to, crash_after(count, lands=lands, counted=ALL)))
        except Crash:
            assert assert_whole(to) in ((), (1,), (1, 3))
        else:
            break
        copied(source, to)
        assert assert_whole(to) == (1, 3)
    assert count > 30


def test_a_crash_on_a_local_disk_leaves_a_torn_file_which_the_next_copy_replaces(
    source: Storage, tmp_path: Path
) -> None:
    """commit P34"""
    to = LocalStorage(tmp_path / "root")
    with pytest.raises(Crash):
        copied(source, Faulty(to, fail_at("write", "steps/1/1/data-1.bin", error=Crash(), lands="half"), no_abort()))
    torn = {entry.key: entry.size for entry in to.list("steps/")}["steps/1/1/data-1.bin"]
    assert 0 < torn < len(source.read("steps/1/1/data-1.bin"))
    assert assert_whole(to) == ()
    copied(source, to)
    assert assert_whole(to) == (1, 3)


def no_abort() -> Fault:
    return fail_at("abort", times=None, error=Crash())


def test_a_file_of_the_right_size_with_a_wrong_bit_is_not_taken_for_whole(source: Storage) -> None:
    """commit P34: what a power cut left has its size and not its bytes."""
    to = MemoryStorage()
    copied(source, to, 1)
    to.delete(record_key(1, 1))
    flip(to, "steps/1/1/data-0.bin", 5000)
    copied(source, to)
    assert assert_whole(to) == (1, 3)


def test_what_a_record_names_at_the_destination_is_never_deleted(source: Storage) -> None:
    """commit P34"""
    to = MemoryStorage()
    copied(source, to, 1)
    data = to.read("steps/1/1/data-0.bin")
    to.delete("steps/1/1/data-0.bin")
    writer = to.create("steps/1/1/data-0.bin")
    writer.write(data[:-1])
    writer.commit()
    with pytest.raises(StorageError, match=r"data-0.bin: it is not what step 1 has there.* and its record is there"):
        copied(source, to)
    assert len(to.read("steps/1/1/data-0.bin")) == len(data) - 1


def flip(storage: Storage, key: str, at: int) -> None:
    data = bytearray(storage.read(key))
    data[at] ^= 16
    storage.delete(key)
    writer = storage.create(key)
    writer.write(bytes(data))
    writer.commit()


def places(source: Storage) -> Iterator[tuple[str, int]]:
    """A byte of each kind: of a block, of the checksums, of objects, plan, files and record."""
    size = len(source.read("steps/3/2/data-0.bin"))
    yield from (("steps/3/2/data-0.bin", at) for at in (0, 4999, size - 900, size - 40, size - 2))
    yield "steps/3/2/files.arrow", 100
    plan = next(entry for entry in source.list("plans/2"))
    yield from ((plan.key, at) for at in (50, plan.size - 20))
    yield from (("records/3-2.json", 60), ("terms/2.json", 30))


@pytest.mark.parametrize("number", range(10))
def test_a_flipped_bit_never_travels(number: int) -> None:
    """commit P32: C5"""
    root, to = saved(numel=1500), MemoryStorage()
    key, at = [*places(root)][number]
    flip(root, key, at)
    with pytest.raises(CorruptCheckpointError):
        copied(root, to)
    assert assert_whole(to) in ((), (1,))


def test_coded_files_are_copied_as_they_are_stored() -> None:
    """commit P32: a bit that flips in a compressed block does not travel."""
    root, to = MemoryStorage(), MemoryStorage()
    save(root, 1, [{"w": torch.arange(20_000.0)}], block_bytes=BLOCK_BYTES, codec="zstd")
    copied(root, to)
    assert to.read("steps/1/1/data-0.bin") == root.read("steps/1/1/data-0.bin")
    assert assert_whole(to) == (1,)
    flip(root, "steps/1/1/data-0.bin", 3000)
    with pytest.raises(CorruptCheckpointError, match="crc32c"):
        copied(root, MemoryStorage())


def test_another_runs_root_is_refused_by_name(source: Storage) -> None:
    """commit P32"""
    to = MemoryStorage()
    save(to, 5, [{"x": torch.ones(2)}])
    before = objects(to)
    with pytest.raises(SupersededError, match="the two hold different histories") as caught:
        copied(source, to)
    assert caught.value.term == 1
    assert objects(to) == before


def test_a_root_that_went_its_own_way_is_refused(source: Storage) -> None:
    """commit P32"""
    to = MemoryStorage()
    copied(source, to, 1)
    state = {"w": torch.zeros(6000), "b": torch.zeros(3), "n": 0}

    def run(ranks: Ranks) -> None:
        with open_on(ranks, to, state) as ckpt:
            ckpt.load()
            ckpt.save(4).wait()

    job(1, run)
    with pytest.raises(SupersededError, match="term 2 there was claimed on host"):
        copied(source, to)
    assert assert_whole(to) == (1, 4)


def test_no_record_is_put_while_a_file_is_missing_in_the_listing(source: Storage) -> None:
    """commit P32: C4"""
    to = MemoryStorage()
    copied(source, to, 1)
    to.delete(record_key(1, 1))
    to.delete("steps/1/1/data-1.bin")
    with pytest.raises(StorageError, match=r"data-1\.bin: its rank wrote .* the listing comes without it"):
        finish(Contents.open(source, read_history(source).record(StepRef(1, 1))), to)
    assert assert_whole(to) == ()


def test_a_step_that_was_deleted_there_stays_deleted(source: Storage) -> None:
    """commit P35"""
    to = MemoryStorage()
    copied(source, to)
    to.delete(record_key(1, 1))
    to.put_if_absent(record_key(1, 1), Tombstone(1, 1, "gc", 1.0).encode())
    assert [step.outcome for step in copied(source, to)] == ["deleted there", "there"]
    assert assert_whole(to) == (3,)


def test_a_step_that_retention_deleted_there_stays_deleted(source: Storage) -> None:
    """commit P35"""
    to = MemoryStorage()
    copied(source, to)
    delete_step(to, read_history(to).record(StepRef(1, 1)), by="retention", now=1.0)
    assert [step.outcome for step in copied(source, to)] == ["deleted there", "there"]
    assert assert_whole(to) == (3,)


def test_a_store_that_says_that_it_has_no_condition_is_refused_before_anything_is_put(source: Storage) -> None:
    class Says(MemoryStorage):
        def lacks_condition(self) -> str:
            return "it was tried"

    to = Says()
    with pytest.raises(NoConditionError, match="it was tried"):
        copied(source, to)
    assert objects(to) == {}
    copied(source, SingleWriter(to))
    assert assert_whole(to) == (1, 3)


def test_a_tombstone_that_comes_meanwhile_wins(source: Storage) -> None:
    """commit P35"""
    to = MemoryStorage()

    def gc(operation: object) -> None:
        to.put_if_absent(record_key(1, 1), Tombstone(1, 1, "gc", 1.0).encode())

    with pytest.raises(SupersededError, match="step 1 of term 1 was deleted there"):
        copied(source, Faulty(to, before(gc, "put_if_absent", "records/*")))
    assert assert_whole(to) == ()


def test_lost_answers_are_read_back(source: Storage) -> None:
    to = MemoryStorage()
    copied(source, Faulty(to, lost_answer("[!t]*", times=None)))
    assert assert_whole(to) == (1, 3)


@pytest.mark.parametrize("operation", ["create", "write", "commit", "put_if_absent", "list"])
def test_an_error_of_the_destination_leaves_whole_steps(source: Storage, operation: str) -> None:
    for nth in (1, 3):
        to = MemoryStorage()
        with pytest.raises(StorageError):
            copied(source, Faulty(to, fail_at(operation, nth=nth)))
        assert assert_whole(to) in ((), (1,))


def test_a_storage_that_hangs_ends_the_copy_by_name(source: Storage) -> None:
    let_go, to = threading.Event(), MemoryStorage()
    began = time.monotonic()
    with pytest.raises(DeadlineError, match=r"step 3: nothing has moved for 0\.5 s"):
        copied(source, Faulty(to, hang(let_go, "write", "steps/3/*")), how=Copying(2, 0.5))
    assert time.monotonic() - began < 10
    let_go.set()
    assert assert_whole(to) == (1,)


def test_slow_is_no_deadline_as_long_as_something_moves(source: Storage) -> None:
    to = MemoryStorage()
    copied(source, Faulty(to, slow(0.1, "write")), how=Copying(1, 0.8))
    assert assert_whole(to) == (1, 3)


def test_a_storage_without_condition_is_refused(source: Storage) -> None:
    class Overwrites(MemoryStorage):
        def put_if_absent(self, key: str, data: bytes) -> bool:
            self.delete(key)
            return super().put_if_absent(key, data)

    with pytest.raises(StorageError, match="does not honour put-if-absent"):
        copied(source, Overwrites())


def test_look_tells_what_is_missing_and_writes_nothing(source: Storage) -> None:
    to = MemoryStorage()
    copied(source, to, 1)
    to.delete(term_key(1))  # even a claim would be written by a copy
    to.put_if_absent(term_key(1), source.read(term_key(1)))
    before = objects(to)
    one, three = CopyPlan(source, to).look()
    assert (one.outcome, one.missing_bytes) == ("there", 0)
    assert (three.outcome, three.missing_bytes) == ("to copy", three.nbytes)
    assert objects(to) == before


def test_memory_is_bounded_by_the_parts_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part is read only when the one before the last has been written."""
    from dscheck.commit import blocks

    monkeypatch.setattr(blocks, "CHUNK_BYTES", 4 * BLOCK_BYTES)
    root, to = Faulty(saved(numel=100_000)), MemoryStorage()
    ahead: list[int] = []

    def count(operation: object) -> None:
        ahead.append(root.count("read_into") - written.count("write"))

    written = Faulty(to, before(count, "write", "steps/*", times=None), slow(0.005, "write"))
    copied(root, written, 1)
    assert max(ahead) <= 3
    assert root.count("read_into") > 40
