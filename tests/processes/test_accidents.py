"""What the other ranks see, and the root holds, when one rank dies, raises or never arrives. There is no agent."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from dscheck import Checkpointer, sharded
from dscheck.errors import DscheckError, RankFailureError
from dscheck.storage import LocalStorage
from dscheck.testing.faults import Fault, Faulty, after, amid, before
from tests.processes.pool import Ended, Job, note
from tests.processes.roots import newest

RANKS = 3
TIMEOUT_S = 5.0
SOON_S = 3.0
"""How long a failure takes that nobody has to wait for, on a busy machine."""


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def state_at(step: int, rank: int) -> dict[str, Any]:
    """Rows of one tensor, a tensor that all claim, and plain data; all say which step it is."""
    rows = torch.full((2, 5), float(10 * step + rank))
    return {"rows": sharded(rows, (2 * RANKS, 5), (2 * rank, 0)), "all": torch.full((7,), float(step)), "step": step}


def move_to(state: dict[str, Any], step: int, rank: int) -> None:
    new = state_at(step, rank)
    state["rows"].local.copy_(new["rows"].local)
    state["all"].copy_(new["all"])
    state["step"] = step


@dataclass(frozen=True)
class Accident:
    """What happens to rank `victim` in the save of step 2, and what the others must get: None, or an error's class.

    `fault` is in its storage; `instead` is called before its `save()`.
    """

    victim: int
    error: str | None
    within_s: float
    fault: Fault | None = None
    instead: Callable[[dict[str, Any]], None] | None = None
    newest: int = 1


def raise_in_training(state: dict[str, Any]) -> None:
    raise ZeroDivisionError("in the model")


def put_what_cannot_be_stored(state: dict[str, Any]) -> None:
    state["bad"] = object()


def sleep(state: dict[str, Any]) -> None:
    time.sleep(TIMEOUT_S + SOON_S)


LATE_S = TIMEOUT_S + 5.0
ACCIDENTS = {
    "killed before its save": Accident(1, "DeadlineError", LATE_S, instead=die),
    "killed half way in its data file": Accident(1, "DeadlineError", LATE_S, amid(die, "steps/2/*")),
    "killed when its data file is whole": Accident(1, "DeadlineError", LATE_S, after(die, "commit", "steps/2/*")),
    "rank 0 killed before its save": Accident(0, "RankFailureError", SOON_S, instead=die),
    "rank 0 killed half way in its data file": Accident(0, "RankFailureError", SOON_S, amid(die, "steps/2/*")),
    "rank 0 killed before the record": Accident(
        0, "RankFailureError", SOON_S, before(die, "put_if_absent", "records/2-*")
    ),
    "rank 0 killed when the record is there": Accident(
        0, None, SOON_S, after(die, "put_if_absent", "records/2-*"), newest=2
    ),
    "raises in save": Accident(2, "RankFailureError", SOON_S, instead=put_what_cannot_be_stored),
    "raises in training": Accident(2, "RankFailureError", SOON_S, instead=raise_in_training),
    "never arrives": Accident(2, "DeadlineError", LATE_S, instead=sleep),
    "rank 0 never arrives": Accident(0, "DeadlineError", LATE_S, instead=sleep),
}


class Outcome(NamedTuple):
    error: Exception | None
    seconds: float


def meet(rank: int, name: str, root: str, port: int) -> Outcome:
    """Save step 1; in the save of step 2 the accident happens to its victim."""
    accident, state = ACCIDENTS[name], state_at(1, rank)
    mine = rank == accident.victim
    storage = LocalStorage(root)
    faulty = Faulty(storage, accident.fault) if mine and accident.fault else storage
    with Checkpointer(faulty, state, timeout_s=TIMEOUT_S, store_port=port) as ckpt:
        ckpt.save(1).wait()
        move_to(state, 2, rank)
        dist.barrier()
        note("saved")
        began = time.monotonic()
        if mine and accident.instead:
            accident.instead(state)
        try:
            ckpt.save(2).wait()
        except DscheckError as error:
            return Outcome(error, time.monotonic() - began)
        return Outcome(None, time.monotonic() - began)


def go_on(rank: int, root: str, port: int) -> list[int]:
    """The next run in the same root, with its store on the same port."""
    state = state_at(0, rank)
    with Checkpointer(root, state, timeout_s=30.0, store_port=port) as ckpt:
        assert ckpt.load() == 1
        assert (state["step"], state["all"][0].item()) == (1, 1.0)
        assert (state["rows"].local == 10 + rank).all()
        move_to(state, 2, rank)
        ckpt.save(2).wait()
        move_to(state, 3, rank)
        ckpt.save(3).wait()
        return ckpt.steps()


@dataclass(frozen=True)
class Scene:
    """All that came of one accident. The root is `folder`/root."""

    folder: Path
    port: int
    ended: list[Ended]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scene]:
    """All accidents at once, since they mostly wait; each starts when the one before has saved step 1."""
    jobs = {}
    for name in ACCIDENTS:
        folder, port = tmp_path_factory.mktemp("accident"), free_port()
        jobs[name] = folder, port, Job(folder / "job", RANKS, meet, name, str(folder / "root"), port)
        jobs[name][2].wait_for(0, "saved")
    return {name: Scene(folder, port, job.join()) for name, (folder, port, job) in jobs.items()}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("name", ACCIDENTS)
def test_the_others_get_in_time_an_error_that_names_the_rank(name: str, scenes: dict[str, Scene]) -> None:
    accident = ACCIDENTS[name]
    for ended in scenes[name].ended:
        if ended.rank != accident.victim:
            error, seconds = ended.result()
            assert (None if error is None else type(error).__name__) == accident.error, error
            assert error is None or list(error.fields["ranks"]) == [accident.victim], error
            assert error is None or f"rank {accident.victim}" in str(error) or "ranks to arrive" in str(error)
            assert seconds < accident.within_s


@pytest.mark.parametrize("name", ACCIDENTS)
def test_the_root_holds_old_or_new_whole(name: str, scenes: dict[str, Scene]) -> None:
    root = scenes[name].folder / "root"
    whole = {"rows": torch.zeros(2 * RANKS, 5), "all": torch.zeros(7), "step": 0}
    with Checkpointer(root, whole, rng=False) as ckpt:
        step = ckpt.load()
    assert step == ACCIDENTS[name].newest
    assert whole["step"] == step
    assert torch.equal(whole["all"], torch.full((7,), float(step)))
    rows = [state_at(step, rank)["rows"].local for rank in range(RANKS)]
    assert torch.equal(whole["rows"], torch.cat(rows))
    assert len(newest(root).files) == RANKS


@pytest.mark.parametrize("name", ["rank 0 killed before its save", "killed half way in its data file"])
def test_the_next_run_sees_nothing_of_one_that_died(name: str, scenes: dict[str, Scene], tmp_path: Path) -> None:
    """TRAPS 26: the same port, the same rounds, and whatever the dead ones had posted."""
    scene = scenes[name]
    job = Job(tmp_path / "next", RANKS, go_on, str(scene.folder / "root"), scene.port)
    assert job.results() == [[1, 2, 3]] * RANKS


def leave_a_round(rank: int, root: str) -> Outcome:
    """Rank 1 is late for the save that rank 2 gives up by an exception, while it waits with rank 0."""
    began = time.monotonic()
    try:
        with Checkpointer(root, state_at(1, rank), timeout_s=TIMEOUT_S) as ckpt:
            dist.barrier()
            began = time.monotonic()
            if rank == 1:
                time.sleep(TIMEOUT_S - 1.0)
            handle = ckpt.save(1)
            if rank == 2:
                time.sleep(0.5)
                raise ZeroDivisionError("in the model")
            handle.wait()
    except (DscheckError, ZeroDivisionError) as error:
        return Outcome(error, time.monotonic() - began)
    raise AssertionError("saved")


def test_a_rank_that_leaves_by_an_exception_ends_the_round_it_waits_in(tmp_path: Path) -> None:
    first, late, left = Job(tmp_path / "job", RANKS, leave_a_round, str(tmp_path / "root")).results()
    assert isinstance(left.error, ZeroDivisionError)
    assert left.seconds < SOON_S
    assert first.error.fields["ranks"] == (2,)
    assert first.seconds < 0.5 + SOON_S
    assert isinstance(late.error, RankFailureError)
