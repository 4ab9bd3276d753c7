"""Which step may come next, and which failures are told when."""

from __future__ import annotations

import pytest

from dscheck.errors import ConfigError, SaveSkippedError, StorageError
from dscheck.save.handle import SaveHandle
from dscheck.save.ledger import Ledger


def ledger(*ended: tuple[int, Exception | None]) -> Ledger:
    found = Ledger()
    for step, error in ended:
        handle = SaveHandle(step, 1.0)
        handle.finish(error)
        found.add(handle)
    found.settle()
    return found


def test_steps_loaded_committed_and_under_way_count_and_failed_ones_do_not() -> None:
    kept = ledger((3, None), (5, StorageError("no")))
    assert kept.newest == 3
    kept.check(4)
    kept.add(SaveHandle(7, 1.0))
    with pytest.raises(ConfigError, match="step 7 does not exceed step 7"):
        kept.check(7)
    kept.restart(2)
    kept.check(3)
    with pytest.raises(ConfigError):
        kept.check(2)


def test_an_older_save_that_ends_later_does_not_free_newer_steps() -> None:
    kept, late = Ledger(), SaveHandle(4, 1.0)
    kept.add(late)
    newer = SaveHandle(6, 1.0)
    kept.add(newer)
    newer.finish()
    kept.settle()
    late.finish()
    kept.settle()
    assert kept.newest == 6


def test_each_error_is_raised_once_and_one_of_several_saves_too() -> None:
    shared, other = StorageError("hung"), StorageError("full")
    kept = ledger((1, shared), (2, shared), (3, SaveSkippedError("busy")), (4, other))
    for expected in (shared, other):
        with pytest.raises(StorageError) as caught:
            kept.raise_untold()
        assert caught.value is expected
    kept.raise_untold()


def test_a_handle_says_what_has_become_of_its_save() -> None:
    handle = SaveHandle(3, 1.0)
    assert "being captured" in repr(handle)
    handle.captured()
    assert "captured, not committed" in repr(handle)
    handle.finish()
    assert "committed in" in repr(handle)
    failed = SaveHandle(4, 1.0)
    failed.finish(StorageError("disk full"))
    assert "failed: StorageError: disk full" in repr(failed)
