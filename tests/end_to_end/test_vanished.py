"""A load whose step is deleted meanwhile says so, and starts again where the newest step was asked for (C6)."""

from __future__ import annotations

import time

import pytest
import torch

from dscheck import CheckpointNotFoundError, RankFailureError, StepVanishedError, sharded
from dscheck.commit import read_history
from dscheck.commit.delete import delete_step
from dscheck.ranks.base import Ranks
from dscheck.storage import Storage
from dscheck.testing.faults import Fault, Faulty, before
from tests.end_to_end.worlds import fresh, job, open_on, outcomes


def saved(root: Storage, *steps: int) -> None:
    """Steps by two ranks; the value of each tensor is the step."""

    def run(ranks: Ranks) -> None:
        state = {"x": torch.zeros(4), "w": sharded(torch.zeros(8, 4), (16, 4), (8 * ranks.rank, 0))}
        with open_on(ranks, root, state) as ckpt:
            for step in steps:
                state["x"].fill_(step)
                state["w"].local.fill_(step)
                ckpt.save(step).wait()

    job(2, run)


def deleting(root: Storage, op: str, key: str, *steps: int) -> Fault:
    """Just before the first such operation, others delete these steps."""

    def delete(operation: object) -> None:
        for step in steps:
            record = read_history(root).resolve(step)
            assert record is not None
            delete_step(root, record, by="a test", now=time.time())

    return before(delete, op, key)


@pytest.mark.parametrize(
    ("op", "key"),
    [("read", "plans/*"), ("read", "steps/3/1/files.arrow"), ("read*", "steps/3/1/data-1.bin"), ("read_into", "*")],
)
def test_the_newest_step_is_looked_for_again(op: str, key: str) -> None:
    """commit P15"""
    root = fresh()
    saved(root, 1, 2, 3)
    fault = deleting(root, op, key, 3)

    def run(ranks: Ranks) -> list[float]:
        state = {"x": torch.zeros(4), "w": sharded(torch.zeros(8, 4), (16, 4), (8 * ranks.rank, 0))}
        with open_on(ranks, Faulty(root, fault), state) as ckpt:
            assert ckpt.load() == 2
            ckpt.save(10).wait()
        return [*state["x"].tolist(), *state["w"].local.flatten().tolist()]

    assert job(2, run) == [[2.0] * 36] * 2
    assert [ref.step for ref in read_history(root).visible] == [1, 2, 10]


def test_a_step_that_was_asked_for_is_an_error_that_names_who_deleted_it() -> None:
    root = fresh()
    saved(root, 1, 2, 3)
    fault = deleting(root, "read", "steps/2/1/files.arrow", 2)

    def run(ranks: Ranks) -> None:
        state = {"x": torch.zeros(4), "w": sharded(torch.zeros(8, 4), (16, 4), (8 * ranks.rank, 0))}
        with open_on(ranks, Faulty(root, fault), state) as ckpt:
            ckpt.load(2)

    found = outcomes(2, run)
    assert all(isinstance(error, StepVanishedError | RankFailureError) for error in found)
    assert any(isinstance(error, StepVanishedError) and error.fields["step"] == 2 for error in found)
    assert all("step 2 of term 1 was deleted while it was loaded (a test)" in str(error) for error in found)


def test_an_object_that_is_missing_while_its_record_is_there_is_no_deletion() -> None:
    """commit P15"""
    root = fresh()
    saved(root, 1, 2)
    root.delete("steps/2/1/data-1.bin")

    def run(ranks: Ranks) -> None:
        with open_on(ranks, root, {"x": torch.zeros(4), "w": torch.zeros(16, 4)}) as ckpt:
            ckpt.load()

    found = outcomes(2, run)
    assert not any(isinstance(error, StepVanishedError) for error in found)
    assert any(isinstance(error, CheckpointNotFoundError) for error in found)


def test_when_no_step_is_left_the_load_fails_and_is_no_fresh_run() -> None:
    root = fresh()
    saved(root, 1)
    fault = deleting(root, "read", "steps/1/1/files.arrow", 1)

    def run(ranks: Ranks) -> None:
        with open_on(ranks, Faulty(root, fault), {"x": torch.zeros(4), "w": torch.zeros(16, 4)}) as ckpt:
            ckpt.load()

    assert all(isinstance(error, StepVanishedError | RankFailureError) for error in outcomes(2, run))
