"""Real processes over gloo, without an agent: under torchrun the others would be ended 0.1 s after one dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

JOB = Path(__file__).with_name("job.py")
ROOT = Path(__file__).parents[2]

Report = Callable[[str, int], Any]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """What a rank of a job in job.py reported. All jobs run at once: they mostly wait."""
    out = tmp_path_factory.mktemp("jobs")
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    env.pop("MASTER_ADDR", None)
    done = subprocess.run([sys.executable, str(JOB), str(out)], env=env, capture_output=True, text=True, timeout=120)

    def of(job: str, rank: int) -> Any:
        path = out / f"{job}-{rank}.json"
        assert path.exists(), done.stderr
        return json.loads(path.read_text())

    return of


def check_error(report: Any, kind: str, ranks: list[int], within_s: float) -> None:
    name, message, named, took_s = report
    assert (name, named) == (kind, ranks), message
    assert took_s < within_s


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named_by_all_others(report: Report, rank: int) -> None:
    check_error(report("killed_2", rank), "DeadlineError", [2], within_s=2 + 5)


@pytest.mark.parametrize("rank", [1, 2])
def test_a_killed_rank_0_is_named_long_before_the_deadline(report: Report, rank: int) -> None:
    """TRAPS 27."""
    check_error(report("killed_0", rank), "RankFailureError", [0], within_s=4)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_second_job_on_the_same_port_sees_nothing_of_the_first(report: Report, rank: int) -> None:
    """TRAPS 26."""
    assert report("agree_after_killed_0", rank) == ["0,1,2", "0,1,2"]


def test_a_stopped_rank_0_holds_nobody_past_the_deadline(report: Report) -> None:
    check_error(report("stopped_0", 1), "DeadlineError", [0], within_s=1 + 4)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_never_comes_is_named_in_time(report: Report, rank: int) -> None:
    check_error(report("absent_1", rank), "DeadlineError", [1], within_s=1 + 5)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failed_rank_fails_the_others_while_one_is_away(report: Report, rank: int) -> None:
    check_error(report("failed_1", rank), "RankFailureError", [1], within_s=1.9)


def test_a_rank_0_that_ends_leaves_its_answer_to_late_ranks(report: Report) -> None:
    name, message, *_ = report("left_0", 1)
    assert (name, message) == ("RankFailureError", "plan of step 300: rank 0 failed: disk full")
