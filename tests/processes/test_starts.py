"""The ways a script is started: plain python, torchrun, torchrun that restarts it; and the one that is a mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dscheck import Checkpointer
from dscheck.errors import ConfigError
from tests.processes.pool import Job
from tests.processes.training import Holding, Kind, build, fingerprint

SCRIPT = Path(__file__).with_name("script.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]


def run(*command: Any) -> None:
    """Run python in a process of its own; raises with its output when it fails."""
    here = {"PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    # Else gloo may find the addresses of the dead in the store that its ranks shared with the agent.
    here["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    command = (sys.executable, *map(str, command))
    done = subprocess.run(command, env=os.environ | here, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]


def train(rank: int, last: int) -> list[Holding]:
    """What this rank holds at each step from 0 on when nobody disturbs it."""
    training = build("fsdp", Kind(), seed=1)
    held = [training.holds()]
    for _ in range(last):
        training.step()
        held.append(training.holds())
    return held


def test_one_script_under_torchrun_after_its_restart_and_under_plain_python(tmp_path: Path) -> None:
    root, said = tmp_path / "root", tmp_path / "said"
    run(*TORCHRUN, SCRIPT, root, 4, said)
    run(SCRIPT, root, 5, said)
    steps = Job(tmp_path / "undisturbed", 2, train, 4).results()
    first, second = (
        [json.loads(line) for line in (tmp_path / f"said-{rank}").read_text().splitlines()] for rank in (0, 1)
    )
    # Both start, both start again from step 2, since step 3 was torn; then rank 0 goes on alone.
    assert first[:2] == [[step, fingerprint([steps[0][step]])] for step in (0, 2)]
    assert second == [[step, fingerprint([steps[1][step]])] for step in (0, 2)]
    assert first[2:] == [[4, fingerprint([steps[0][4], steps[1][4]])]]


def construct(rank: int, root: str) -> None:
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is 2.*init_process_group"):
        Checkpointer(root, {"step": 0})


def test_several_ranks_without_a_process_group_are_told_what_to_do(tmp_path: Path) -> None:
    root = tmp_path / "root"
    Job(tmp_path / "job", 2, construct, str(root), group=False, env={"WORLD_SIZE": "2"}).results()
    assert not root.exists()
