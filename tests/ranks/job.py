"""Jobs of several processes without an agent. `python job.py OUT` runs all of JOBS at once.

What came of rank 1 of job "agree" is in OUT/agree-1.json. All ranks are forks of one process, which imports torch once.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dscheck.errors import DscheckError
from dscheck.ranks import Failed, Ok, Ranks, open_ranks


def ask(ranks: Ranks, round: str, mine: Ok | Failed | None = None, timeout_s: float = 10.0) -> str:
    mine = mine or Ok(str(ranks.rank).encode())
    answer = ranks.exchange(round, mine, b",".join, deadline=time.monotonic() + timeout_s, phase="plan of step 300")
    return answer.decode()


def fail(ranks: Ranks, round: str, mine: Ok | Failed | None = None, timeout_s: float = 10.0) -> list[Any] | None:
    """Class, message, named ranks and seconds of the error that the exchange raises; None when it raises none."""
    started = time.monotonic()
    try:
        ask(ranks, round, mine, timeout_s)
    except DscheckError as error:
        return [type(error).__name__, str(error), list(error.fields["ranks"]), time.monotonic() - started]
    return None


def agree(ranks: Ranks) -> Any:
    return [ask(ranks, "a"), ask(ranks, "b")]


def killed_2(ranks: Ranks) -> Any:
    ask(ranks, "a")
    if ranks.rank == 2:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    return fail(ranks, "b", timeout_s=2.0)


def killed_0(ranks: Ranks) -> Any:
    """The store dies with its host, while posts of round "b" lie in it."""
    ask(ranks, "a")
    if ranks.rank == 0:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    return fail(ranks, "b", timeout_s=5.0)


def stopped_0(ranks: Ranks) -> Any:
    """The store neither answers nor breaks."""
    if ranks.rank > 0:
        time.sleep(1)
        return fail(ranks, "a", timeout_s=1.0)
    time.sleep(0.5)  # Rank 1 is still acknowledging the opening.
    if os.fork() == 0:
        time.sleep(6)
        os.kill(os.getppid(), signal.SIGCONT)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGSTOP)
    return None


def absent_1(ranks: Ranks) -> Any:
    """Rank 1 lives, but does not come to the round."""
    if ranks.rank == 1:
        return time.sleep(2)
    return fail(ranks, "a", timeout_s=1.0)


def failed_1(ranks: Ranks) -> Any:
    """Rank 2 lives, but does not come to the round."""
    if ranks.rank == 2:
        return time.sleep(2)
    return fail(ranks, "a", Failed("disk full") if ranks.rank == 1 else None)


def left_0(ranks: Ranks) -> Any:
    """Rank 0 fails the round and ends, without close(), before rank 1 comes."""
    if ranks.rank == 1:
        time.sleep(1)
    return fail(ranks, "a", Failed("disk full") if ranks.rank == 0 else None)


@dataclass
class Job:
    role: Callable[[Ranks], Any]
    size: int
    name: str = ""


# Each line is a chain: its jobs run one after the other, with the store on one port.
JOBS = [
    [Job(killed_0, 3), Job(agree, 3, "agree_after_killed_0")],
    [Job(killed_2, 3)],
    [Job(stopped_0, 2)],
    [Job(absent_1, 3)],
    [Job(failed_1, 3)],
    [Job(left_0, 2)],
]


def run_rank(job: Job, rank: int, init_port: int, store_port: int, out: Path) -> None:
    init, patience = f"tcp://127.0.0.1:{init_port}", timedelta(seconds=30)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=job.size, timeout=patience)
    # A given port on rank 0; its host's own names, since no MASTER_ADDR is set.
    report = job.role(open_ranks(20.0, port=store_port))
    (out / f"{job.name or job.role.__name__}-{rank}.json").write_text(json.dumps(report))
    # As an interpreter ends, but for torch's own 1 to 3 s of it.
    atexit._run_exitfuncs()
    os._exit(0)


def fork(*calls: Callable[[], None]) -> bool:
    """Run each call in a process of its own and wait for all: True in this process, False in each of them."""
    pids = []
    for call in calls:
        pid = os.fork()
        if pid == 0:
            call()
            return False
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run_chain(chain: list[Job], out: Path) -> None:
    store_port = free_port()
    for job in chain:
        init_port = free_port()
        if not fork(*(partial(run_rank, job, rank, init_port, store_port, out) for rank in range(job.size))):
            return


if __name__ == "__main__":
    fork(*(partial(run_chain, chain, Path(sys.argv[1])) for chain in JOBS))
