"""Which step is the newest when jobs go back, start over, crash and overlap: whole jobs over ranks as threads."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dscheck import Checkpointer, CheckpointNotFoundError, DscheckError, SupersededError
from dscheck.ranks import Solo
from dscheck.ranks.base import Ranks
from dscheck.storage import LocalStorage, Storage
from dscheck.testing.faults import Crash, Faulty, crash_after, fail_at
from tests.end_to_end.worlds import fresh, job, open_on, outcomes

RANKS = 2
pytestmark = pytest.mark.filterwarnings("ignore:dscheck:RuntimeWarning")


def state(step: int) -> dict[str, Any]:
    return {"x": torch.full((400,), float(step))}


def saved(root: Storage, *steps: int, **settings: Any) -> None:
    """A job from the newest step on, or with `fresh` from nothing, that saves these steps."""

    def run(ranks: Ranks) -> None:
        live = state(0)
        with open_on(ranks, root, live, **settings) as ckpt:
            if not settings:
                ckpt.load()
            for step in steps:
                live["x"].fill_(step)
                ckpt.save(step).wait()

    job(RANKS, run)


def crash_in_data_file(root: Storage, step: int, load: int | None, **settings: Any) -> None:
    """A job that loads `load` (None: nothing) and dies, on all ranks, half way in a data file of its next save."""
    fault = crash_after(0, lands="half", counted=frozenset({"write"}))

    def run(ranks: Ranks) -> None:
        ckpt = open_on(ranks, Faulty(root, fault), state(0), timeout_s=5.0, **settings)
        try:
            if load is not None:
                assert ckpt.load(load) == load
            ckpt.save(step).wait()
        finally:
            ckpt.close(abort=True)

    died = [outcome for outcome in outcomes(RANKS, run) if isinstance(outcome, Crash)]
    assert any(f"crashed in write 'steps/{step}/" in str(crash) for crash in died)


def newest(root: Storage) -> tuple[int | None, list[int], int | None, float]:
    """What a job that starts now finds: latest(), steps(), what load() returns, and the value in the state."""

    def run(ranks: Ranks) -> tuple[int | None, list[int], int | None, float]:
        live = state(0)
        with open_on(ranks, root, live) as ckpt:
            latest, steps, loaded = ckpt.latest(), ckpt.steps(), ckpt.load()
            return latest, steps, loaded, live["x"].mean().item()

    found = job(RANKS, run)
    assert found[1:] == found[:-1]
    return found[0]


def listed(root: Path) -> dict[int, str]:
    """`dscheck ls --json`: the history that each step belongs to."""
    code = "from dscheck.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "ls", "--json", str(root)], capture_output=True, check=True)
    return {row["step"]: row["history"] for row in json.loads(done.stdout)}


def test_a_rollback_that_crashes_in_its_first_save_stays_a_rollback(tmp_path: Path) -> None:
    """TRAPS 29: load(300) with 400 and 500 present, and a crash in 310; 500 is abandoned, and shown so."""
    root = LocalStorage(tmp_path / "root")
    saved(root, 300, 400, 500)
    crash_in_data_file(root, 310, load=300)
    assert newest(root) == (300, [300], 300, 300.0)
    assert listed(tmp_path / "root") == {300: "newest", 400: "abandoned", 500: "abandoned"}
    with (
        Checkpointer(root, state(0), rng=False) as ckpt,
        pytest.raises(CheckpointNotFoundError, match="step 500 was committed by term 1"),
    ):
        ckpt.load(500)
    saved(root, 310)
    assert newest(root) == (310, [300, 310], 310, 310.0)


def test_a_load_alone_rolls_nothing_back() -> None:
    """A job that only loads writes nothing; the claim comes with its first save."""
    root = fresh()
    saved(root, 300, 400)

    def run(ranks: Ranks) -> None:
        with open_on(ranks, root, state(0)) as ckpt:
            assert ckpt.load(300) == 300

    job(RANKS, run)
    assert newest(root)[0] == 400


def test_a_fresh_start_that_crashes_in_its_first_save_leaves_the_old_run() -> None:
    """Invariant C3: until the new run has a step, the old one's is the newest; then none of it is left."""
    root = fresh()
    saved(root, 300, 400)
    crash_in_data_file(root, 10, load=None, fresh=True)
    assert newest(root) == (400, [300, 400], 400, 400.0)
    saved(root, 10, fresh=True)
    assert newest(root) == (10, [10], 10, 10.0)


def test_an_old_job_that_goes_on_does_not_stop_the_new_one_and_is_then_refused() -> None:
    """It commits after the new one has loaded: that step is abandoned, and its next save is refused."""
    root = fresh()

    def run(ranks: Ranks) -> None:
        with open_on(ranks, root, state(1)) as old, open_on(Solo(), root, state(0)) as new:
            old.save(100).wait()
            assert new.load() == 100
            old.save(200).wait()
            assert new.latest() == 200
            new.save(110).wait()
            assert (new.latest(), new.steps()) == (110, [100, 110])
            with pytest.raises(SupersededError, match="term 2"):
                old.save(300).wait()
            new.save(120).wait()
            assert new.steps() == [100, 110, 120]

    job(1, run)
    assert {entry.key for entry in root.list("records/")} == {
        f"records/{step}-{term}.json" for step, term in ((100, 1), (200, 1), (110, 2), (120, 2))
    }


def test_a_claim_without_an_answer_ends_the_older_term() -> None:
    """It may still arrive, and continues from before whatever that term would commit meanwhile."""
    root = fresh()
    faults = fail_at("write", "steps/200/*", error=errno.ENOSPC), fail_at("put_if_absent", "terms/2.json")

    def run(ranks: Ranks) -> None:
        with open_on(ranks, Faulty(root, *faults), state(1)) as ckpt:
            ckpt.save(100).wait()
            for _ in range(2):
                with pytest.raises(DscheckError):
                    ckpt.save(200).wait()
            ckpt.save(300).wait()
            assert ckpt.steps() == [100, 300]

    job(1, run)
    assert {entry.key for entry in root.list("records/")} == {"records/100-1.json", "records/300-2.json"}
