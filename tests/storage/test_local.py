"""What LocalStorage does when the file system fails it, lies to it, or holds what dscheck did not put there."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import shutil
import stat
import threading
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from dscheck.errors import CheckpointNotFoundError, ConfigError, CorruptCheckpointError, StorageError
from dscheck.storage import LocalStorage
from dscheck.testing.conformance import listed, write_object

KEY = "records/1-1.json"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "7"


@pytest.fixture
def storage(root: Path) -> LocalStorage:
    return LocalStorage(root)


def everything(root: Path) -> set[str]:
    """All that lies below the root but directories, temporary files included."""
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_symlink() or not path.is_dir()}


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def broken(monkeypatch: pytest.MonkeyPatch, name: str, code: int, when: Callable[..., bool] = lambda *_: True) -> None:
    """`os.<name>` raises `code` where `when` holds of its arguments."""
    call = getattr(os, name)

    def fails(*args: Any, **kwargs: Any) -> Any:
        if when(*args):
            raise OSError(code, os.strerror(code))
        return call(*args, **kwargs)

    monkeypatch.setattr(os, name, fails)


def is_directory(fd: int) -> bool:
    return stat.S_ISDIR(os.fstat(fd).st_mode)


def is_file(fd: int) -> bool:
    return not is_directory(fd)


def claim(root: str, rounds: int, rank: int, barrier: Barrier, pipe: Any) -> None:
    storage = LocalStorage(root)
    won = []
    for number in range(rounds):
        barrier.wait(60)
        won.append(storage.put_if_absent(f"terms/{number}.json", b"%d" % rank * 1000))
    pipe.send(won)


def test_of_eight_racing_processes_exactly_one_wins(root: Path) -> None:
    count, rounds = 8, 25
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(count)
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    processes = [
        context.Process(target=claim, args=(str(root), rounds, rank, barrier, pipes[rank][1])) for rank in range(count)
    ]
    for process, (_, sender) in zip(processes, pipes, strict=True):
        process.start()
        # So that a process that dies ends the wait for its answer.
        sender.close()
    won = [receiver.recv() for receiver, _ in pipes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    for number in range(rounds):
        winners = [rank for rank in range(count) if won[rank][number]]
        assert len(winners) == 1
        assert (root / f"terms/{number}.json").read_bytes() == b"%d" % winners[0] * 1000
    assert everything(root) == {f"terms/{number}.json" for number in range(rounds)}


# put_if_absent


@pytest.mark.parametrize("code", [errno.EEXIST, errno.EIO, errno.ESTALE])
def test_a_link_that_was_made_is_a_win_whatever_the_answer(
    storage: LocalStorage, root: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    link = os.link

    def loses_its_answer(source: str, target: str) -> None:
        link(source, target)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", loses_its_answer)
    assert storage.put_if_absent(KEY, b"x") is True
    assert everything(root) == {KEY}


def test_a_raised_link_count_is_no_win(storage: LocalStorage, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.put_if_absent(KEY, b"theirs")
    link = os.link

    def backed_up(source: str, target: str) -> None:
        link(source, root / "records" / "backup")
        link(source, target)

    monkeypatch.setattr(os, "link", backed_up)
    assert storage.put_if_absent(KEY, b"ours") is False


@pytest.mark.parametrize(
    ("name", "code", "when"),
    [
        ("write", errno.ENOSPC, lambda fd, data: True),
        ("fsync", errno.EIO, is_file),
        ("link", errno.EIO, lambda *_: True),
    ],
)
def test_a_failed_put_leaves_nothing_and_works_again(
    storage: LocalStorage, root: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int, when: Callable[..., bool]
) -> None:
    before = open_files()
    with monkeypatch.context() as patch:
        broken(patch, name, code, when)
        with pytest.raises(StorageError, match=re.escape(os.strerror(code))) as caught:
            storage.put_if_absent(KEY, b"x")
    assert caught.value.fields == {"url": str(root), "key": KEY}
    assert everything(root) == set()
    assert open_files() == before
    assert storage.put_if_absent(KEY, b"x")


def test_a_put_whose_directory_was_not_synced_is_taken_back(
    storage: LocalStorage, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.put_if_absent("records/0-1.json", b"x")
    with monkeypatch.context() as patch:
        broken(patch, "fsync", errno.EIO, is_directory)
        with pytest.raises(StorageError):
            storage.put_if_absent(KEY, b"x")
    assert everything(root) == {"records/0-1.json"}


def test_a_new_directory_whose_entry_was_not_synced_is_taken_back(
    storage: LocalStorage, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.put_if_absent("top", b"x")
    with monkeypatch.context() as patch:
        broken(patch, "fsync", errno.EIO, is_directory)
        with pytest.raises(StorageError):
            storage.create(KEY)
    assert not (root / "records").exists()
    assert storage.put_if_absent(KEY, b"x")


def test_a_file_system_without_directory_sync_is_used_as_it_is(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch, "fsync", errno.EINVAL, is_directory)
    assert storage.put_if_absent(KEY, b"x")
    assert write_object(storage, "steps/1/1/data-0.bin", b"x") == 1


def test_a_file_system_without_hard_links_is_named(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, "link", errno.EPERM)
    with pytest.raises(StorageError, match="makes no hard links"):
        storage.put_if_absent(KEY, b"x")


def test_a_directory_in_the_place_of_an_object_is_an_error(storage: LocalStorage, root: Path) -> None:
    (root / KEY).mkdir(parents=True)
    for attempt in (
        lambda: storage.put_if_absent(KEY, b"x"),
        lambda: storage.create(KEY),
        lambda: storage.read(KEY),
        lambda: storage.delete(KEY),
    ):
        with pytest.raises(StorageError):
            attempt()
    assert (root / KEY).is_dir()


# create, write, commit, abort


def test_short_writes_go_on(storage: LocalStorage, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
    data = bytes(range(100))
    assert write_object(storage, "a", data, data) == 200
    assert storage.put_if_absent("b", data)
    assert (root / "a").read_bytes() == data * 2
    assert (root / "b").read_bytes() == data


def test_a_write_without_progress_is_an_error(
    storage: LocalStorage, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = storage.create("a")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: 0)
        with pytest.raises(StorageError, match="the last 3 of 3 bytes"):
            writer.write(b"abc")
        with pytest.raises(StorageError):
            storage.put_if_absent("b", b"abc")
    writer.abort()
    assert everything(root) == set()


@pytest.mark.parametrize("name", ["write", "fsync", "close"])
def test_a_failure_is_final(storage: LocalStorage, root: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The kernel reports a lost page once: the same call, tried again, would succeed (TRAPS 31)."""
    before = open_files()
    writer = storage.create("steps/1/1/data-0.bin")
    writer.write(b"first")
    call = getattr(os, name)
    failures = [OSError(errno.EIO, os.strerror(errno.EIO))]

    def fails_once(fd: int, *args: Any) -> Any:
        result = call(fd, *args)
        if failures:
            raise failures.pop()
        return result

    monkeypatch.setattr(os, name, fails_once)
    with pytest.raises(StorageError, match=r"steps/1/1/data-0\.bin': Input/output error"):
        writer.write(b"second") if name == "write" else writer.commit()
    assert not failures
    with pytest.raises(StorageError, match="failed before"):
        writer.commit()
    with pytest.raises(StorageError, match="failed before"):
        writer.write(b"third")
    writer.abort()
    assert everything(root) == set()
    assert open_files() == before


def test_a_commit_whose_directory_was_not_synced_fails(
    storage: LocalStorage, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = storage.create("a/b")
    broken(monkeypatch, "fsync", errno.EIO, is_directory)
    with pytest.raises(StorageError):
        writer.commit()
    writer.abort()
    assert everything(root) == set()


def test_a_file_that_another_changed_is_not_committed(storage: LocalStorage, root: Path) -> None:
    writer = storage.create("a")
    writer.write(b"abc")
    os.truncate(root / "a", 2)
    with pytest.raises(StorageError, match="3 bytes were written, and the file holds 2"):
        writer.commit()


def test_abort_and_commit_leave_the_file_of_another_alone(storage: LocalStorage, root: Path) -> None:
    for finish in ("abort", "commit"):
        writer = storage.create("a")
        (root / "a").unlink()
        (root / "a").write_bytes(b"another's")
        if finish == "commit":
            with pytest.raises(StorageError, match="deleted while it was written"):
                writer.commit()
        writer.abort()
        assert (root / "a").read_bytes() == b"another's"
        (root / "a").unlink()


def test_a_forgotten_writer_closes_its_file(storage: LocalStorage) -> None:
    before = open_files()
    writer = storage.create("a")
    assert open_files() == before + 1
    del writer
    assert open_files() == before


# read, list


def test_short_reads_go_on(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(range(100))
    storage.put_if_absent("a", data)
    pread, preadv = os.pread, os.preadv
    monkeypatch.setattr(os, "pread", lambda fd, count, offset: pread(fd, min(count, 7), offset))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:7]], offset))
    assert storage.read("a") == data
    assert storage.read("a", 3, 50) == data[3:53]
    buffer = bytearray(50)
    storage.read_into("a", 3, memoryview(buffer))
    assert buffer == data[3:53]


def test_a_file_that_shrinks_under_its_reader_is_damage(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.put_if_absent("a", b"abc")
    monkeypatch.setattr(os, "pread", lambda fd, count, offset: b"")
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: 0)
    with pytest.raises(CorruptCheckpointError):
        storage.read("a")
    with pytest.raises(CorruptCheckpointError):
        storage.read_into("a", 0, memoryview(bytearray(3)))


def test_a_fifo_neither_hangs_nor_passes_for_an_object(storage: LocalStorage, root: Path) -> None:
    (root / "records").mkdir(parents=True)
    os.mkfifo(root / KEY)
    with pytest.raises(StorageError, match="not a regular file"):
        storage.read(KEY)
    with pytest.raises(StorageError, match="neither a file nor a directory"):
        list(storage.list("records/"))


def test_names_that_begin_with_a_dot_are_not_listed(storage: LocalStorage, root: Path) -> None:
    storage.put_if_absent("a/b", b"x")
    (root / "a" / ".put-0123").write_bytes(b"left by a crash")
    (root / ".snapshot").mkdir()
    (root / ".snapshot" / "b").write_bytes(b"x")
    os.mkfifo(root / ".fifo")
    assert listed(storage) == {"a/b": 1}


def test_what_vanishes_while_it_is_listed_is_passed_over(
    storage: LocalStorage, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("a/1", "a/2", "b/1", "c"):
        storage.put_if_absent(key, b"x")
    seen = []
    for entry in storage.list(""):
        seen.append(entry.key)
        for path in (root / "a" / "1", root / "a" / "2", root / "b" / "1", root / "c"):
            path.unlink(missing_ok=True)
        for path in (root / "a", root / "b"):
            if path.exists():
                path.rmdir()
    assert len(seen) == 1


# symbolic links: nothing reaches outside of the root (C9)


def test_no_link_in_the_place_of_a_directory_is_followed(storage: LocalStorage, root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "1").mkdir(parents=True)
    (outside / "secret").write_bytes(b"secret")
    (outside / "1" / "secret").write_bytes(b"secret")
    root.mkdir(parents=True)
    (root / "steps").symlink_to(outside)
    (root / "deep" / "1").mkdir(parents=True)
    (root / "deep" / "1" / "2").symlink_to(outside)
    for folder in ("steps", "deep/1/2"):
        for attempt in (
            lambda: storage.put_if_absent(f"{folder}/new", b"x"),  # noqa: B023
            lambda: storage.put_if_absent(f"{folder}/1/new", b"x"),  # noqa: B023
            lambda: storage.create(f"{folder}/new"),  # noqa: B023
            lambda: storage.read(f"{folder}/secret"),  # noqa: B023
            lambda: storage.read(f"{folder}/1/secret"),  # noqa: B023
            lambda: storage.read_into(f"{folder}/secret", 0, memoryview(bytearray(1))),  # noqa: B023
            lambda: storage.delete(f"{folder}/secret"),  # noqa: B023
            lambda: list(storage.list(f"{folder}/")),  # noqa: B023
            lambda: list(storage.list(f"{folder}/1/")),  # noqa: B023
            lambda: list(storage.list("")),
        ):
            with pytest.raises(StorageError):
                attempt()
    assert everything(outside) == {"secret", "1/secret"}


def test_no_link_in_the_place_of_an_object_is_followed(storage: LocalStorage, root: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (root / "records").mkdir(parents=True)
    (root / KEY).symlink_to(tmp_path / "secret")
    (root / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(StorageError, match="no symbolic link is followed"):
        storage.read(KEY)
    for key in (KEY, "dangling"):
        with pytest.raises(StorageError):
            storage.put_if_absent(key, b"x")
        with pytest.raises(StorageError):
            storage.create(key)
    # Passed over it would look like a step that does not exist.
    with pytest.raises(StorageError, match="neither a file nor a directory"):
        list(storage.list("records/"))
    storage.delete(KEY)
    assert (tmp_path / "secret").read_bytes() == b"secret"
    assert not (tmp_path / "nowhere").exists()


def test_the_root_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    storage = LocalStorage(tmp_path / "run")
    assert storage.put_if_absent(KEY, b"x")
    assert (tmp_path / "disk" / KEY).read_bytes() == storage.read(KEY) == b"x"
    assert listed(storage) == {KEY: 1}


# roots that cannot be used


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.EACCES, "give the user of this job read and write permission below the root"),
        (errno.EROFS, "mount the file system for writing"),
        (errno.ENOSPC, "free some space"),
    ],
)
def test_a_root_that_cannot_be_written_is_one_clear_error(
    storage: LocalStorage, root: Path, monkeypatch: pytest.MonkeyPatch, code: int, advice: str
) -> None:
    broken(monkeypatch, "mkdir", code)
    for attempt in (lambda: storage.put_if_absent(KEY, b"x"), lambda: storage.create(KEY)):
        with pytest.raises(StorageError) as caught:
            attempt()
        assert str(root / KEY) in str(caught.value)
        assert os.strerror(code) in str(caught.value)
        assert advice in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_root_without_permission_is_one_clear_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="Permission denied"):
        LocalStorage(tmp_path / "run").put_if_absent(KEY, b"x")


def test_a_parent_that_we_may_not_write_is_not_synced(
    storage: LocalStorage, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access, seen = os.access, []

    def asked(path: str, mode: int) -> bool:
        seen.append(path)
        return path != str(tmp_path) and access(path, mode)

    monkeypatch.setattr(os, "access", asked)
    assert storage.put_if_absent(KEY, b"x")
    assert seen == [str(tmp_path / "runs"), str(tmp_path)]


def test_a_root_that_became_a_file_is_an_error_for_every_verb(storage: LocalStorage, root: Path) -> None:
    root.parent.mkdir()
    root.write_bytes(b"x")
    with pytest.raises(ConfigError):
        LocalStorage(root)
    for attempt in (
        lambda: storage.put_if_absent("a", b"x"),
        lambda: storage.create("a"),
        lambda: storage.read("a"),
        lambda: storage.delete("a"),
        lambda: list(storage.list("")),
    ):
        with pytest.raises(StorageError):
            attempt()
    assert root.read_bytes() == b"x"


def test_a_read_of_a_missing_root_is_a_missing_object(storage: LocalStorage) -> None:
    with pytest.raises(CheckpointNotFoundError):
        storage.read(KEY)


def test_threads_that_make_the_same_directories_all_succeed(storage: LocalStorage) -> None:
    barrier = threading.Barrier(8, timeout=60)
    failures: list[BaseException] = []

    def write(rank: int) -> None:
        for step in range(5):
            barrier.wait()
            try:
                write_object(storage, f"steps/{step}/1/data-{rank}.bin", b"x")
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=write, args=(rank,)) for rank in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert len(listed(storage)) == 40


def test_a_text_that_begins_with_a_tilde_is_below_the_home_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert LocalStorage("~/runs").url == str(tmp_path / "runs")


def test_a_root_that_vanished_is_an_error_with_advice(storage: LocalStorage, root: Path) -> None:
    storage.put_if_absent(KEY, b"x")
    shutil.rmtree(root)
    with pytest.raises(StorageError, match="deleted while this job ran"):
        storage.put_if_absent("records/2-1.json", b"x")


@pytest.mark.parametrize("prefix", ["", "records/", "records/1-"])
def test_an_empty_directory_in_the_place_of_an_object_is_listed_as_an_error(
    storage: LocalStorage, root: Path, prefix: str
) -> None:
    (root / KEY).mkdir(parents=True)
    with pytest.raises(StorageError, match=r"'records/1-1\.json' is a directory in the place of an object"):
        listed(storage, prefix)
    assert not listed(storage, "terms/")
