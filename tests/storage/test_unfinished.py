"""What killed writers leave below a local root, where no listing shows it."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from dscheck.commit.gc import collect
from dscheck.errors import StorageError
from dscheck.storage import LocalStorage, MemoryStorage
from dscheck.storage.base import UnfinishedUploads
from dscheck.testing.faults import Faulty
from tests.commit.jobs import Job

OLD = ".put-" + "0a" * 16
YOUNG = ".put-" + "1b" * 16


def leave(path: Path, hours_ago: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"half a put")
    return aged(path, hours_ago)


def aged(path: Path, hours_ago: float) -> Path:
    then = time.time() - 3600 * hours_ago
    os.utime(path, (then, then))
    return path


def test_temporary_files_of_killed_puts_go_when_they_are_old(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    old, young = leave(tmp_path / "records" / OLD, 30), leave(tmp_path / "records" / YOUNG, 1)
    elsewhere = leave(tmp_path / "steps/1/1" / OLD, 30)
    assert storage.abort_unfinished("records/", 86400) == 1
    assert not old.exists()
    assert young.exists()
    assert elsewhere.exists()
    assert storage.abort_unfinished("", 86400) == 1
    assert storage.abort_unfinished("never/was/", 86400) == 0


@pytest.mark.parametrize("name", [".nfs0001", ".put-notes", ".dscheck-tuning.json", ".put-" + "0A" * 16, "put"])
def test_files_that_are_not_of_a_put_stay(tmp_path: Path, name: str) -> None:
    path = leave(tmp_path / "records" / name, 900)
    assert LocalStorage(tmp_path).abort_unfinished("", 1.0) == 0
    assert path.exists()


def test_directories_go_when_they_are_empty_and_old(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    for step, hours_ago in (1, 30), (2, 1):
        storage.put_if_absent(f"steps/{step}/1/data-0.bin", b"x")
        storage.delete(f"steps/{step}/1/data-0.bin")
        aged(tmp_path / f"steps/{step}/1", hours_ago)
    storage.put_if_absent("steps/3/1/data-0.bin", b"x")
    aged(tmp_path / "steps/3/1", 30)
    storage.abort_unfinished("steps/", 86400)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_dir()}
    assert left == {"steps", "steps/1", "steps/2", "steps/2/1", "steps/3", "steps/3/1"}
    aged(tmp_path / "steps/1", 30)
    storage.abort_unfinished("steps/", 86400)
    assert not (tmp_path / "steps/1").exists()


def test_a_directory_that_it_may_not_write_to_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(tmp_path / "records" / OLD, 30)

    def refuse(path: str) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(StorageError, match=r"cannot clean up .* give the user of this job read and write permission"):
        LocalStorage(tmp_path).abort_unfinished("", 1.0)


def test_no_link_is_followed(tmp_path: Path) -> None:
    outside = leave(tmp_path / "outside" / OLD, 30)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "records").symlink_to(tmp_path / "outside")
    with pytest.raises(StorageError):
        LocalStorage(tmp_path / "run").abort_unfinished("records/", 1.0)
    assert LocalStorage(tmp_path / "run").abort_unfinished("", 1.0) == 0
    assert outside.exists()


def test_gc_cleans_up_where_the_storage_can_and_leaves_other_folders_alone(tmp_path: Path) -> None:
    Job.start(LocalStorage(tmp_path)).save(1)
    leave(tmp_path / "terms" / OLD, 30)
    leave(tmp_path / "steps/1/1" / OLD, 30)
    (tmp_path / "logs").mkdir()
    aged(tmp_path / "logs", 900)
    assert collect(LocalStorage(tmp_path), by="gc", now=1e9, dry_run=True).unfinished == 0
    assert collect(LocalStorage(tmp_path), by="gc", now=1e9).unfinished == 2
    assert (tmp_path / "logs").exists()


def test_a_wrapper_does_not_offer_it() -> None:
    assert not isinstance(MemoryStorage(), UnfinishedUploads)
    assert not isinstance(Faulty(MemoryStorage()), UnfinishedUploads)
    assert isinstance(LocalStorage("/nowhere"), UnfinishedUploads)
