"""Invariant C3: a crash, a kill or a power cut at any point leaves the newest step of before or of after, loadable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dscheck import DscheckError, sharded
from dscheck.ranks.base import Ranks
from dscheck.storage import LocalStorage, Storage
from dscheck.testing.faults import ALL, CrashAfter, Faulty, crash_after
from tests.end_to_end.worlds import fresh, load, open_on, outcomes, save

RANKS = 3
pytestmark = pytest.mark.filterwarnings("ignore:dscheck:RuntimeWarning")


def states_at(step: int, ranks: int = RANKS) -> list[dict[str, Any]]:
    """What every rank holds at a step: rows of one tensor, one tensor that all claim, and plain data."""
    rows = 12 // ranks
    return [
        {
            "w": sharded(torch.full((rows, 5), float(step * 100 + rank)), (12, 5), (rank * rows, 0)),
            "all": torch.full((7,), float(step)),
            "step": step,
        }
        for rank in range(ranks)
    ]


def assert_holds_one_of(root: Storage, steps: tuple[int, ...]) -> int:
    """Exactly one of these steps is the newest, and its contents are what that step held."""
    wanted = states_at(0)
    found = load(root, wanted)[0].step
    assert found in steps
    for got, expected in zip(wanted, states_at(found), strict=True):
        assert torch.equal(got["w"].local, expected["w"].local)
        assert torch.equal(got["all"], expected["all"])
        assert got["step"] == found
    return int(found)


def continue_from(root: Storage, faulty: Callable[[int], Storage], step: int) -> list[Any]:
    """A job that loads the newest step, changes its state and saves `step`, each rank through its own storage."""
    after = states_at(step)

    def run(ranks: Ranks) -> Any:
        state = states_at(0)[ranks.rank]
        ckpt = open_on(ranks, faulty(ranks.rank), state, timeout_s=2.0)
        try:
            ckpt.load()
            with torch.no_grad():
                state["w"].local.copy_(after[ranks.rank]["w"].local)
                state["all"].copy_(after[ranks.rank]["all"])
            state["step"] = step
            ckpt.save(step).wait()
        finally:
            ckpt.close(abort=True)

    return outcomes(RANKS, run)


def operations(make: Callable[[], Storage], dead: int | None) -> int:
    """How many storage operations there are to crash after, of one rank or of all together."""
    root = make()
    save(root, 1, states_at(1))
    seen = [Faulty(root) for _ in range(RANKS)]
    assert all(outcome is None for outcome in continue_from(root, lambda rank: seen[rank], 2))
    return sum(len([op for op in s.log if op.name in ALL]) for r, s in enumerate(seen) if dead in (None, r))


@pytest.mark.parametrize("dead", [0, 1, None], ids=["the coordinator", "another rank", "all ranks"])
def test_a_crash_after_every_kth_storage_operation_leaves_old_or_new(dead: int | None) -> None:
    last = operations(fresh, dead)
    found = set()
    for k in range(last):
        root = fresh()
        save(root, 1, states_at(1))
        fault: CrashAfter = crash_after(k, lands="half", counted=ALL)

        def storage(rank: int, root: Storage = root, fault: CrashAfter = fault) -> Storage:
            return Faulty(root, fault) if dead in (None, rank) else root

        results = continue_from(root, storage, 2)
        assert any(isinstance(result, Exception) for result in results) or not fault.crashed.is_set()
        step = assert_holds_one_of(root, (1, 2))
        found.add(step)
        if all(result is None for result in results):
            assert step == 2
    assert found >= {1}


def test_a_root_that_crashed_goes_on_with_the_next_save(tmp_path: Any) -> None:
    root = LocalStorage(tmp_path / "root")
    save(root, 1, states_at(1))
    fault = crash_after(6, counted=ALL)
    results = continue_from(root, lambda rank: Faulty(root, fault), 2)
    assert all(isinstance(result, Exception) for result in results)
    assert all(result is None for result in continue_from(root, lambda rank: root, 3))
    assert assert_holds_one_of(root, (3,)) == 3


def test_the_error_of_a_crashed_rank_names_it() -> None:
    root = fresh()
    save(root, 1, states_at(1))
    fault = crash_after(0, counted=frozenset({"write"}))
    results = continue_from(root, lambda rank: Faulty(root, fault) if rank == 2 else root, 2)
    for rank in (0, 1):
        assert isinstance(results[rank], DscheckError)
        assert results[rank].ranks in ((2,), [2])
