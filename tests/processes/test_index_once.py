"""A host reads the index of a step once, whatever the number of its ranks; one that fails or dies there is named."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dscheck import Checkpointer
from dscheck.errors import CorruptCheckpointError, DeadlineError, RankFailureError, StorageError
from dscheck.load import memory
from dscheck.storage import LocalStorage
from dscheck.testing import Faulty, fail_at
from dscheck.testing.faults import Operation, Proceed
from tests.processes.pool import Job
from tests.processes.roots import newest

TENSORS, A_HOST, RANKS = 300, 3, 6
READER = 3
"""It reads the head of the plan for the second host."""


def weights(seed: int) -> dict[str, Any]:
    return {f"layer{i}.weight": torch.full((7, 5), float(seed + i)) for i in range(TENSORS)} | {"epoch": seed}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("index_once") / "root"
    with Checkpointer(root, {"w": weights(1)}, rng=False) as ckpt:
        ckpt.save(1).wait()
    return root


def load(rank: int, root: str, faults: dict[int, Any], timeout_s: float = 30.0) -> Any:
    """The report and what the storage was asked for, or the error and the seconds until then."""
    memory._host = lambda: [str(rank // A_HOST)]
    storage = Faulty(LocalStorage(root), *faults.get(rank, ()))
    live = weights(1000)
    with Checkpointer(storage, {"w": live}, timeout_s=timeout_s, rng=False) as ckpt:
        before, began = len(storage.log), time.monotonic()
        try:
            ckpt.load()
        except Exception as error:
            return error, time.monotonic() - began
        assert live["epoch"] == 1
        assert all(torch.equal(live[name], value) for name, value in weights(1).items() if name != "epoch")
        return ckpt.loaded, [(op.key, op.offset, op.nbytes) for op in storage.log[before:] if op.name == "read"]


def test_two_hosts_of_three_ranks_read_the_index_twice(root: Path, tmp_path: Path) -> None:
    contents = newest(root)
    row = contents.files[0]
    index = contents.plan.size + contents.record.files.size + row.ours.size + row.checksums.size
    found = Job(tmp_path / "job", RANKS, load, str(root), {}).results()
    asked = [read for _, reads in found for read in reads if read[:2] != (contents.key(0), row.mine.offset)]
    assert sum(nbytes for _, _, nbytes in asked) == 2 * index
    assert sum(nbytes for key, _, nbytes in asked if key == contents.plan.key) == 2 * contents.plan.size
    reports = [report for report, _ in found]
    assert [report.index_bytes_read + report.index_bytes_received for report in reports[1:]] == [index] * (RANKS - 1)
    assert sum(report.index_bytes_read for report in reports[A_HOST:]) == index
    history = reports[0].index_bytes_read + reports[0].index_bytes_received - index
    assert 0 < history < 2000, "the coordinator has read the record too"
    assert all(report.index_bytes_received <= report.bytes_received for report in reports)


def fails(operation: Operation, proceed: Proceed) -> Any:
    """No plan can be read."""
    return fail_at("read", "plans/*")(operation, proceed)


def test_a_rank_that_cannot_read_the_index_ends_the_load_on_all_by_its_name(root: Path, tmp_path: Path) -> None:
    found = Job(tmp_path / "job", RANKS, load, str(root), {READER: [fails]}).results()
    for rank, (error, seconds) in enumerate(found):
        assert seconds < 15, "nobody waits for a deadline"
        if rank == READER:
            assert isinstance(error, StorageError)
            continue
        assert isinstance(error, RankFailureError)
        assert error.ranks == (READER,)  # type: ignore[attr-defined]
        assert "injected" in str(error)


def test_the_coordinator_that_cannot_read_the_index_is_named_too(root: Path, tmp_path: Path) -> None:
    found = Job(tmp_path / "job", RANKS, load, str(root), {0: [fails]}).results()
    assert isinstance(found[0][0], StorageError)
    for error, _ in found[1:]:
        assert isinstance(error, RankFailureError)
        assert error.ranks == (0,)  # type: ignore[attr-defined]
        assert "injected" in str(error)


def dies(operation: Operation, proceed: Proceed) -> Any:
    """The process ends in its first read of a plan."""
    if operation.name == "read" and operation.key.startswith("plans/"):
        os._exit(1)
    return proceed(operation)


def test_a_rank_that_dies_with_the_index_of_its_host_is_named_by_all(root: Path, tmp_path: Path) -> None:
    ended = Job(tmp_path / "job", RANKS, load, str(root), {READER: [dies]}, 4.0).join(40.0)
    for rank in set(range(RANKS)) - {READER}:
        error, seconds = ended[rank].value
        assert isinstance(error, DeadlineError)
        assert error.ranks == (READER,)  # type: ignore[attr-defined]
        assert "1 of 6 ranks to arrive: 3" in str(error)
        assert seconds < 15


def flips(operation: Operation, proceed: Proceed) -> Any:
    """What this rank reads of a plan has another bit."""
    data = proceed(operation)
    if operation.name == "read" and operation.key.startswith("plans/"):
        return bytes([data[0] ^ 1]) + data[1:]
    return data


def test_each_rank_verifies_what_another_has_read(root: Path, tmp_path: Path) -> None:
    found = Job(tmp_path / "job", RANKS, load, str(root), {READER: [flips]}).results()
    for rank, (error, _) in enumerate(found):
        assert isinstance(error, CorruptCheckpointError if rank >= A_HOST else RankFailureError)
        assert "SHA-256" in str(error)
