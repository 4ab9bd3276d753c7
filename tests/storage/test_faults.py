"""The faults do what they say, no more: a test that relies on one is worth as much as the fault."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dscheck.errors import StorageError
from dscheck.storage import LocalStorage, MemoryStorage, Storage
from dscheck.testing import (
    Crash,
    Faulty,
    Operation,
    PowerCut,
    after,
    amid,
    before,
    crash_after,
    fail_at,
    hang,
    lost_answer,
    slow,
)
from dscheck.testing.conformance import listed, write_object


def job(storage: Storage) -> None:
    """Nine operations, eight of them changes."""
    storage.put_if_absent("terms/1.json", b"term")
    writer = storage.create("steps/1/1/data-0.bin")
    writer.write(b"01234567")
    writer.write(b"89abcdef")
    writer.commit()
    storage.put_if_absent("records/1-1.json", b"record")
    storage.read("records/1-1.json")
    storage.delete("terms/1.json")
    writer.abort()


STATES = [
    {},
    {"terms/1.json": b"term"},
    {"terms/1.json": b"term", "steps/1/1/data-0.bin": b""},
    {"terms/1.json": b"term", "steps/1/1/data-0.bin": b"01234567"},
    {"terms/1.json": b"term", "steps/1/1/data-0.bin": b"0123456789abcdef"},
    {"terms/1.json": b"term", "steps/1/1/data-0.bin": b"0123456789abcdef"},
    {"terms/1.json": b"term", "steps/1/1/data-0.bin": b"0123456789abcdef", "records/1-1.json": b"record"},
    {"steps/1/1/data-0.bin": b"0123456789abcdef", "records/1-1.json": b"record"},
]


def contents(storage: Storage) -> dict[str, bytes]:
    return {key: storage.read(key) for key in listed(storage)}


def test_a_crash_after_k_changes_lets_exactly_k_take_effect() -> None:
    for k, state in enumerate(STATES):
        inner, crash = MemoryStorage(), crash_after(k)
        if k < len(STATES) - 1:
            with pytest.raises(Crash):
                job(Faulty(inner, crash))
        else:
            job(Faulty(inner, crash))
        assert crash.crashed.is_set() == (k < len(STATES) - 1)
        assert contents(inner) == state


def test_a_crash_may_come_after_its_operation_took_effect() -> None:
    for k, state in enumerate(STATES[1:]):
        inner = MemoryStorage()
        with pytest.raises(Crash):
            job(Faulty(inner, crash_after(k, lands="all")))
        assert contents(inner) == state


def test_a_crash_in_the_middle_of_a_write_leaves_half_of_it() -> None:
    inner = MemoryStorage()
    with pytest.raises(Crash):
        job(Faulty(inner, crash_after(3, lands="half")))
    assert inner.read("steps/1/1/data-0.bin") == b"0123456789ab"


def test_a_crashed_process_changes_nothing_more() -> None:
    inner = MemoryStorage()
    storage = Faulty(inner, crash_after(2))
    storage.put_if_absent("a", b"x")
    writer = storage.create("b")
    with pytest.raises(Crash):
        writer.write(b"x")
    writer.abort()
    for attempt in (
        lambda: storage.put_if_absent("c", b"x"),
        lambda: storage.create("c"),
        lambda: storage.read("a"),
        lambda: storage.read_into("a", 0, memoryview(bytearray(1))),
        lambda: storage.list(""),
        lambda: storage.delete("a"),
    ):
        with pytest.raises(Crash):
            attempt()
    assert contents(inner) == {"a": b"x", "b": b""}


def test_reads_count_where_they_are_asked_to() -> None:
    storage = Faulty(MemoryStorage(), crash_after(1, counted=frozenset({"read"})))
    storage.put_if_absent("a", b"x")
    storage.read("a")
    storage.delete("b")
    with pytest.raises(Crash):
        storage.read("a")


def test_one_crash_takes_the_storages_of_all_ranks() -> None:
    inner, crash = MemoryStorage(), crash_after(10)
    storages = [Faulty(inner, crash) for _ in range(4)]

    def rank(number: int) -> int:
        for done in range(100):
            try:
                storages[number].put_if_absent(f"{number}/{done}", b"x")
            except Crash:
                return done
        return 100

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(rank, range(4))) == 10
    assert len(listed(inner)) == 10


def test_the_nth_matching_operation_fails_and_no_other() -> None:
    storage = Faulty(MemoryStorage(), fail_at("put_if_absent", "records/*", nth=2, times=2, error=errno.ENOSPC))
    assert storage.put_if_absent("terms/1.json", b"x")
    assert storage.put_if_absent("records/1-1.json", b"x")
    for _ in range(2):
        with pytest.raises(StorageError, match=r"'records/2-1\.json': No space left on device") as caught:
            storage.put_if_absent("records/2-1.json", b"x")
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno == errno.ENOSPC
    assert storage.put_if_absent("records/2-1.json", b"x")
    assert storage.count("put_if_absent", "records/*") == 4


def test_a_given_error_is_raised_for_ever() -> None:
    storage = Faulty(MemoryStorage(), fail_at("read", error=TimeoutError("slow down"), times=None))
    storage.put_if_absent("a", b"x")
    for _ in range(3):
        with pytest.raises(TimeoutError, match="slow down"):
            storage.read("a")


def test_a_short_write_leaves_half_and_the_writer_stays_failed() -> None:
    inner = MemoryStorage()
    storage = Faulty(inner, fail_at("write", "a", nth=2, error=errno.ENOSPC, lands="half"))
    writer = storage.create("a")
    writer.write(b"01")
    with pytest.raises(StorageError):
        writer.write(b"2345")
    assert inner.read("a") == b"0123"
    for attempt in (lambda: writer.write(b"6"), writer.commit):
        with pytest.raises(StorageError, match="failed before"):
            attempt()
    writer.abort()
    assert listed(inner) == {}


def test_a_failed_commit_leaves_an_object_to_abort(tmp_path: Path) -> None:
    storage = Faulty(LocalStorage(tmp_path / "run"), fail_at("commit", "a"))
    writer = storage.create("a")
    writer.write(b"x")
    for _ in range(2):
        with pytest.raises(StorageError):
            writer.commit()
    writer.abort()
    assert listed(storage) == {}


def test_a_lost_answer_hides_a_success() -> None:
    inner = MemoryStorage()
    storage = Faulty(inner, lost_answer("records/*"))
    with pytest.raises(StorageError, match="timed out"):
        storage.put_if_absent("records/1-1.json", b"ours")
    assert inner.read("records/1-1.json") == b"ours"
    assert storage.put_if_absent("records/1-1.json", b"ours") is False


def test_slow_delays_what_it_matches() -> None:
    storage = Faulty(MemoryStorage(), slow(0.05, "read", "a"))
    storage.put_if_absent("a", b"x")
    start = time.monotonic()
    storage.read("a")
    storage.read("a")
    assert time.monotonic() - start >= 0.1


def test_a_hung_operation_goes_on_when_it_is_let_go() -> None:
    release, reached = threading.Event(), threading.Event()
    storage = Faulty(MemoryStorage(), before(lambda op: reached.set(), "commit"), hang(release, "commit"))
    with ThreadPoolExecutor(1) as pool:
        size = pool.submit(write_object, storage, "a", b"xyz")
        assert reached.wait(60)
        assert not size.done()
        release.set()
        assert size.result(60) == 3


def test_a_forgotten_hang_ends_in_an_error() -> None:
    storage = Faulty(MemoryStorage(), hang(threading.Event(), "list", limit_s=0.01))
    with pytest.raises(TimeoutError, match="list"):
        storage.list("")


def test_callbacks_see_the_operation_and_its_moment() -> None:
    inner = MemoryStorage()
    seen: list[tuple[str, Operation, dict[str, int]]] = []

    def note(moment: str) -> object:
        return lambda operation: seen.append((moment, operation, listed(inner)))

    storage = Faulty(
        inner,
        before(note("before"), "write", nth=2),  # type: ignore[arg-type]
        amid(note("amid"), nth=2),  # type: ignore[arg-type]
        after(note("after"), "write", nth=2),  # type: ignore[arg-type]
    )
    write_object(storage, "a", b"01", b"2345", b"67")
    assert inner.read("a") == b"01234567"
    assert [moment for moment, _, _ in seen] == ["before", "after", "amid"]
    assert [state["a"] for _, _, state in seen] == [2, 4, 4]
    assert [(operation.offset, operation.nbytes) for _, operation, _ in seen] == [(2, 4), (2, 2), (2, 4)]


def test_the_log_holds_every_operation_and_no_bytes() -> None:
    storage = Faulty(MemoryStorage())
    job(storage)
    assert [(op.name, op.offset, op.nbytes) for op in storage.log] == [
        ("put_if_absent", 0, 4),
        ("create", 0, 0),
        ("write", 0, 8),
        ("write", 8, 8),
        ("commit", 16, 0),
        ("put_if_absent", 0, 6),
        ("read", 0, 0),
        ("delete", 0, 0),
        ("abort", 16, 0),
    ]
    assert not any(op.data for op in storage.log)
    assert storage.count("write", "steps/*") == 2
    assert storage.count() == 9


KILLED = """
import os, signal, sys
from dscheck.storage import LocalStorage
from dscheck.testing import Faulty, amid
kill = amid(lambda op: os.kill(os.getpid(), signal.SIGKILL), "steps/*")
storage = Faulty(LocalStorage(sys.argv[1]), kill)
storage.put_if_absent("terms/1.json", b"term")
writer = storage.create("steps/1/1/data-0.bin")
writer.write(bytes(1000))
"""


def test_a_process_can_kill_itself_half_way_in_its_file(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], timeout=60, env={**os.environ})
    assert done.returncode == -signal.SIGKILL
    assert listed(LocalStorage(tmp_path)) == {"terms/1.json": 4, "steps/1/1/data-0.bin": 500}


# PowerCut


def test_what_was_made_durable_outlives_the_cut() -> None:
    disk = PowerCut()
    disk.put_if_absent("kept", b"kept")
    disk.put_if_absent("deleted", b"deleted")
    disk.delete("deleted")
    write_object(disk, "committed", b"0123")
    loose = disk.create("loose")
    loose.write(b"0123456789")
    aborted = disk.create("aborted")
    aborted.write(b"0123456789")
    aborted.abort()
    found = [contents(disk.cut(seed)) for seed in range(60)]
    for state in found:
        assert state.pop("kept") == b"kept"
        assert state.pop("committed") == b"0123"
    for key in ("loose", "aborted"):
        remains = {state.pop(key, None) for state in found}
        assert {None, b"0123456789"} < remains, "nothing, all,"
        assert any(part and part == b"0123456789"[: len(part)] and len(part) < 10 for part in remains), "a part,"
        assert any(part and len(part) == 10 and part[-1] == 0 for part in remains), "or zeros may be left"
    assert not any(found)
    assert contents(disk.cut(7)) == contents(disk.cut(7))


def test_a_cut_changes_nothing_for_those_who_live_on() -> None:
    disk = PowerCut()
    writer = disk.create("a")
    writer.write(b"01")
    after = disk.cut(1)
    writer.write(b"23")
    writer.commit()
    assert contents(disk) == contents(disk.cut(2)) == {"a": b"0123"}
    assert after.url != disk.url


def test_a_key_used_again_after_an_abort_is_durable_when_put() -> None:
    disk = PowerCut()
    writer = disk.create("a")
    writer.write(b"old")
    writer.abort()
    disk.put_if_absent("a", b"new")
    assert all(contents(disk.cut(seed)) == {"a": b"new"} for seed in range(20))
