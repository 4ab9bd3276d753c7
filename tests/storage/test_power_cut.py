"""C3 for LocalStorage: wherever the power goes, what was acknowledged is there and no put is half there."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dscheck.storage import LocalStorage
from dscheck.testing.posix import Disk, Event

DATA = b"0123456789" * 3
PUT_KEYS = {"records/1-1.json", "records/2-1.json", "terms/1.json"}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(str(tmp_path))
    with disk.recording():
        yield disk


@pytest.fixture
def storage(disk: Disk) -> LocalStorage:
    return LocalStorage(os.path.join(disk.base, "runs", "7"))


def put(disk: Disk, storage: LocalStorage, key: str) -> None:
    assert storage.put_if_absent(key, DATA)
    disk.mark(("holds", key))


def create(disk: Disk, storage: LocalStorage, key: str) -> None:
    writer = storage.create(key)
    for start in range(0, len(DATA), 7):
        writer.write(DATA[start : start + 7])
    assert writer.commit() == len(DATA)
    disk.mark(("holds", key))


def delete(disk: Disk, storage: LocalStorage, key: str) -> None:
    disk.mark(("going", key))
    storage.delete(key)
    disk.mark(("gone", key))


def broken_promises(disk: Disk, events: list[Event], seeds: int = 6) -> list[str]:
    """What a power cut after each event in turn breaks; the events need not be all that happened."""
    broken = []
    for count in range(len(events) + 1):
        promised = dict(reversed(event.data) for event in events[:count] if event.name == "mark")
        for seed in range(seeds):
            left = disk.after_cut(random.Random(seed), events[:count])
            found = {path.removeprefix("runs/7/"): data for path, data in left.items()}
            for key, promise in promised.items():
                if (promise == "holds" and found.get(key) != DATA) or (promise == "gone" and key in found):
                    broken.append(f"cut after {count}: {key} {promise}, found {found.get(key)!r}")
            broken += [f"cut after {count}: half of {key}" for key in PUT_KEYS if found.get(key, DATA) != DATA]
    return broken


def test_what_was_acknowledged_outlives_any_cut(disk: Disk, storage: LocalStorage) -> None:
    put(disk, storage, "terms/1.json")
    create(disk, storage, "steps/1/1/data-0.bin")
    create(disk, storage, "steps/1/1/data-1.bin")
    put(disk, storage, "records/1-1.json")
    storage.create("steps/2/1/data-0.bin").abort()
    create(disk, storage, "steps/2/1/data-0.bin")
    put(disk, storage, "records/2-1.json")
    assert not storage.put_if_absent("records/2-1.json", b"other")
    delete(disk, storage, "records/1-1.json")
    delete(disk, storage, "steps/1/1/data-0.bin")
    assert broken_promises(disk, disk.events) == []


def test_directories_that_another_rank_has_just_made_are_synced_too(disk: Disk, storage: LocalStorage) -> None:
    os.makedirs(os.path.join(storage.root, "steps/1/1"))
    create(disk, storage, "steps/1/1/data-0.bin")
    assert broken_promises(disk, disk.events) == []


@pytest.mark.parametrize("write", [put, create])
def test_no_sync_is_one_too_many(
    disk: Disk, storage: LocalStorage, write: Callable[[Disk, LocalStorage, str], None]
) -> None:
    write(disk, storage, "records/1-1.json")
    syncs = [index for index, event in enumerate(disk.events) if event.name == "fsync"]
    # The file; its directory; the entries of records, 7 and runs in the directories above.
    assert len(syncs) == 5
    for index in syncs:
        without = disk.events[:index] + disk.events[index + 1 :]
        assert broken_promises(disk, without), disk.calls()[index]


def test_a_second_object_costs_one_sync_and_one_of_its_directory(disk: Disk, storage: LocalStorage) -> None:
    put(disk, storage, "records/1-1.json")
    before = len(disk.calls())
    put(disk, storage, "records/2-1.json")
    assert disk.calls()[before:] == [
        "create runs/7/records/*",
        "write runs/7/records/*",
        "fsync runs/7/records/*",
        "link runs/7/records/2-1.json",
        "fsync runs/7/records",
        "unlink runs/7/records/*",
    ]


def test_a_new_root_is_synced_from_above_before_its_first_object(disk: Disk, storage: LocalStorage) -> None:
    create(disk, storage, "a/b")
    assert disk.calls() == [
        "mkdir runs",
        "mkdir runs/7",
        "fsync runs",
        "fsync .",
        "mkdir runs/7/a",
        "fsync runs/7",
        "create runs/7/a/b",
        *["write runs/7/a/b"] * 5,
        "fsync runs/7/a/b",
        "fsync runs/7/a",
    ]


def test_a_linked_root_is_synced_where_it_really_lies(disk: Disk) -> None:
    os.makedirs(os.path.join(disk.base, "real", "7"))
    os.symlink(os.path.join(disk.base, "real", "7"), os.path.join(disk.base, "run"))
    put(disk, LocalStorage(os.path.join(disk.base, "run")), "a")
    assert "fsync real" in disk.calls()
