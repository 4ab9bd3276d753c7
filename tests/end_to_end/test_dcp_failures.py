"""The six accidents that torch.distributed.checkpoint 2.13 turns into silent loss: each is an error, or harmless."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from dscheck import CheckpointNotFoundError, CorruptCheckpointError, StateMismatchError, StorageError, TornSnapshotError
from dscheck.errors import DscheckError, RankFailureError
from dscheck.ranks.base import Ranks
from dscheck.storage import LocalStorage
from dscheck.testing.faults import Faulty, fail_at
from tests.end_to_end.test_crash import assert_holds_one_of, continue_from, states_at
from tests.end_to_end.worlds import job, load, open_on, outcomes, save

pytestmark = pytest.mark.filterwarnings("ignore:dscheck:RuntimeWarning")


@pytest.fixture
def root(tmp_path: Path) -> LocalStorage:
    storage = LocalStorage(tmp_path / "root")
    save(storage, 1, states_at(1))
    return storage


@pytest.mark.parametrize("operation", ["write", "commit", "create"])
def test_1_a_full_disk_under_one_writer_fails_the_save_on_all_ranks(root: LocalStorage, operation: str) -> None:
    """DCP: ENOSPC in one of two writer threads, `save` returns success and commits an index of what is not there."""
    fault = fail_at(operation, "steps/*", error=errno.ENOSPC)
    results = continue_from(root, lambda rank: Faulty(root, fault) if rank == 1 else root, 2)
    assert isinstance(results[1], StorageError)
    assert all(isinstance(results[rank], RankFailureError) for rank in (0, 2))
    assert_holds_one_of(root, (1,))


def test_2_a_flipped_bit_is_an_error_that_names_the_fragment(root: LocalStorage) -> None:
    """DCP: it loads as a wrong value, silently. Invariant C5."""
    path = next(Path(root.root).glob("steps/1/*/data-0.bin"))
    data = bytearray(path.read_bytes())
    data[3] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match=r"fragment '\w+' .* crc32c 0x\w+ stored, 0x\w+ read"):
        load(root, states_at(0))


def test_3_a_save_aborted_over_an_existing_step_leaves_that_step_as_it_was(root: LocalStorage) -> None:
    """DCP: the old index points at new bytes. Here no object is overwritten: the same step again is another term's."""
    before = {path: path.read_bytes() for path in Path(root.root).rglob("*") if path.is_file()}
    fault = fail_at("write", "steps/*", times=None)

    def run(ranks: Ranks) -> None:
        storage = Faulty(root, fault) if ranks.rank == 1 else root
        with open_on(ranks, storage, states_at(9)[ranks.rank], fresh=True) as ckpt, pytest.raises(DscheckError):
            ckpt.save(1).wait()

    job(3, run)
    assert {path: path.read_bytes() for path in before} == before
    assert_holds_one_of(root, (1,))


def test_4_a_region_that_nobody_saved_is_an_error_before_anything_is_touched(root: LocalStorage) -> None:
    """DCP: load "succeeds" and leaves the tensor as it was."""
    wanted = states_at(0)
    for state in wanted:
        state["never saved"] = torch.ones(3)
    with pytest.raises(StateMismatchError, match="never saved"):
        load(root, wanted)
    assert all(torch.equal(got["all"], want["all"]) for got, want in zip(wanted, states_at(0), strict=True))


def test_5_a_missing_data_file_is_an_error_that_names_it(root: LocalStorage) -> None:
    """DCP's safetensors reader: half a tensor loaded, no error."""
    next(Path(root.root).glob("steps/1/*/data-2.bin")).unlink()
    with pytest.raises((CheckpointNotFoundError, CorruptCheckpointError, RankFailureError), match=r"data-2\.bin"):
        load(root, states_at(0))


def test_6_a_failed_capture_is_said_by_the_future_of_capture(tmp_path: Path, monkeypatch: Any) -> None:
    """DCP: staging failed, the staging future says success."""
    from dscheck.snapshot import Capture

    def broken(self: Capture) -> None:
        raise TornSnapshotError("injected", tensor="w")

    def run(ranks: Ranks) -> None:
        with open_on(ranks, tmp_path / "other", {"w": torch.ones(3)}) as ckpt:
            handle = ckpt.save(1)
            with pytest.raises(TornSnapshotError, match="injected"):
                handle.wait_captured()

    monkeypatch.setattr(Capture, "wait", broken)
    assert outcomes(1, run) == [None]
