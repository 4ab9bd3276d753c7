"""Rank 0's terms when answers get lost or arrive late: what the model of the commit protocol leaves out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dscheck import StorageError, SupersededError
from dscheck.commit import read_history
from dscheck.ranks.base import Ranks
from dscheck.testing.faults import Faulty, Operation
from tests.end_to_end.worlds import fresh, job, load, open_on, save

pytestmark = pytest.mark.filterwarnings("ignore:dscheck:RuntimeWarning")


class Late:
    """The first put of a term fails, and its request arrives when `arrive` is called."""

    def __init__(self) -> None:
        self.proceed: Any = None
        self.operation: Operation | None = None

    def __call__(self, operation: Operation, proceed: Any) -> Any:
        if operation.name == "put_if_absent" and operation.key.startswith("terms/") and self.operation is None:
            self.operation, self.proceed = operation, proceed
            raise StorageError("no answer (injected)", key=operation.key)
        return proceed(operation)

    def arrive(self) -> None:
        self.proceed(self.operation)


def test_a_late_claim_of_its_own_does_not_stop_a_job() -> None:
    """commit P3: the next claim passes over it, and continues from the same step."""
    root = fresh()
    save(root, 1, [{"x": torch.ones(2)}])
    late = Late()

    def run(ranks: Ranks) -> list[int]:
        with open_on(ranks, Faulty(root, late), {"x": torch.zeros(2)}) as ckpt:
            ckpt.load()
            with pytest.raises(StorageError, match="no answer"):
                ckpt.save(2).wait()
            late.arrive()
            ckpt.save(2).wait()
            return ckpt.steps()

    assert job(1, run) == [[1, 2]]
    history = read_history(root)
    assert [history.claim(term).parent for term in history.terms] == [None, (1, 1), (1, 1)]
    assert history.newest is not None
    assert history.newest.term == 3


def test_the_claim_of_another_job_does_stop_it() -> None:
    root = fresh()
    save(root, 1, [{"x": torch.ones(2)}])

    def run(ranks: Ranks) -> None:
        with open_on(ranks, root, {"x": torch.zeros(2)}) as ckpt:
            ckpt.load()
            save(root, 7, [{"x": torch.ones(2)}])
            with pytest.raises(SupersededError, match="another job was faster"):
                ckpt.save(2).wait()

    job(1, run)
    assert load(root, [{"x": torch.zeros(2)}])[0].step == 7
