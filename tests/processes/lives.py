"""Training that lives until it is killed, and begins again in the same root. Its contents depend on the step alone."""

from __future__ import annotations

import os
import signal
import threading
import time

import torch.distributed as dist

from dscheck import Checkpointer
from dscheck.errors import DscheckError
from dscheck.save.handle import SaveHandle
from tests.processes.pool import note
from tests.processes.training import Kind, build, fingerprint

RANKS = 3
LAYOUT, KIND = "fsdp", Kind()
TIMEOUT_S = 5.0


def undisturbed(rank: int, last: int) -> list[str]:
    """What this rank holds at each step from 0 to `last`, if nobody is killed and nothing saved."""
    training = build(LAYOUT, KIND, seed=1)
    found = [fingerprint([training.holds()])]
    for _ in range(last):
        training.step()
        found.append(fingerprint([training.holds()]))
    return found


def live(rank: int, root: str, last: int, patient: bool) -> None:
    """Resume, and train to step `last`, saving at every step. Notes on the way:

    ("loaded", step, digest), ("saving", step) before the call, ("committed", step) when a handle says so. When training
    fails, because a peer died, a `patient` rank waits for its last save, and notes its error: ("failed", step, error).
    """
    training = build(LAYOUT, KIND, seed=1)
    handle: SaveHandle | None = None
    with Checkpointer(root, training.state, timeout_s=TIMEOUT_S) as ckpt:
        done = ckpt.load() or 0
        note("loaded", done, fingerprint([training.holds()]))
        try:
            for step in range(done + 1, last + 1):
                training.step()
                note("saving", step)
                before, handle = handle, ckpt.save(step)
                _note_end(before)
        except RuntimeError:
            if patient:
                _note_end(handle)
            raise
        _note_end(handle)


def _note_end(handle: SaveHandle | None) -> None:
    if handle is None:
        return
    try:
        handle.wait()
    except DscheckError as error:
        note("failed", handle.step, error)
    else:
        note("committed", handle.step)


def live_under_agent(rank: int, root: str, last: int, victim: int, delay_s: float) -> None:
    """One agent of torch's elastic launcher, whose workers live; on their first start one is killed after a while."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=RANKS,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        run_id="lives",
        max_restarts=1,
        monitor_interval=0.05,
        start_method="fork",
    )
    # Else gloo finds the addresses of the dead in the store that its ranks shared with the agent.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    elastic_launch(config, _worker)(root, last, victim, delay_s)


def _worker(root: str, last: int, victim: int, delay_s: float) -> None:
    rank, first = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    note("start", first)
    if first and rank == victim:
        threading.Thread(target=_die_after, args=(delay_s,), daemon=True).start()
    dist.init_process_group("gloo")
    live(rank, root, last, patient=False)
    dist.barrier()


def _die_after(seconds: float) -> None:
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)
