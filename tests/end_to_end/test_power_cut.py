"""Invariant C3 under a power cut: the disk holds what was synced, and of the rest any part or nothing."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from dscheck.storage import LocalStorage
from dscheck.testing.posix import Disk
from tests.end_to_end.test_crash import assert_holds_one_of, continue_from, states_at
from tests.end_to_end.worlds import save

pytestmark = pytest.mark.filterwarnings("ignore:dscheck:RuntimeWarning")


def laid_down(base: Path, files: dict[str, bytes]) -> LocalStorage:
    """A root with what a disk held after the cut."""
    for name, data in files.items():
        path = base / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return LocalStorage(base / "root")


def test_a_power_cut_after_any_system_call_leaves_old_or_new(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    disk, root = Disk(str(tmp_path / "disk")), LocalStorage(tmp_path / "disk" / "root")
    with disk.recording():
        save(root, 1, states_at(1))
        one = len(disk.events)
        assert continue_from(root, lambda rank: root, 2) == [None] * 3
    two = len(disk.events)
    found = set()
    for count in range(one, two + 1):
        left = disk.after_cut(random.Random(count), disk.events[:count])
        step = assert_holds_one_of(laid_down(tmp_path / f"after-{count}", left), (1, 2))
        found.add(step)
    assert found == {1, 2}
    assert assert_holds_one_of(laid_down(tmp_path / "acknowledged", left), (2,)) == 2


def test_a_root_goes_on_after_a_power_cut_in_the_middle_of_a_save(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    disk, root = Disk(str(tmp_path / "disk")), LocalStorage(tmp_path / "disk" / "root")
    with disk.recording():
        save(root, 1, states_at(1))
        one = len(disk.events)
        continue_from(root, lambda rank: root, 2)
    for part in (0.2, 0.5, 0.8):
        count = one + int((len(disk.events) - one) * part)
        left = disk.after_cut(random.Random(7), disk.events[:count])
        again = laid_down(tmp_path / f"after-{part}", left)
        assert continue_from(again, lambda rank, again=again: again, 3) == [None] * 3  # type: ignore[misc]
        assert_holds_one_of(again, (3,))
