"""How a job's ranks find each other: once, over the process group that it has anyway."""

from __future__ import annotations

import json
import os
import socket
import time
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from dscheck.errors import ConfigError, DeadlineError, RankFailureError
from dscheck.ranks.base import Ok, Ranks
from dscheck.ranks.solo import Solo

# torch is imported by the functions that need it: what uses the protocol alone must not load it.
if TYPE_CHECKING:
    import torch

_PHASE = "opening the ranks"
_ANNOUNCEMENT_BYTES = 4096


def open_ranks(timeout_s: float, host: str | None = None, port: int = 0) -> Ranks:
    """The ranks of this job: `Solo`, or one a process over a store that rank 0 hosts. Collective, on the main thread.

    `host` and `port` say where the others reach rank 0 (by default MASTER_ADDR or its host's names, and any free port);
    only rank 0's count. Raises ConfigError when the environment names several ranks and no process group is
    initialised, or when rank 0 cannot listen; DeadlineError and RankFailureError when not all come within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    if _world_size() == 1:
        return Solo()
    import torch.distributed as dist

    from dscheck.ranks.store import StoreBoard, StoreRanks, host_store

    rank, token, server = dist.get_rank(), uuid4().hex, None
    announcement: dict[str, Any] = {}
    if rank == 0:
        try:
            server = host_store(port, token)
            announcement = {"hosts": [host] if host else _own_names(), "port": server.port, "token": token}
        except RuntimeError as error:
            announcement = {"error": f"rank 0 cannot listen on port {port}: {str(error).splitlines()[0]}"}
    announcement = json.loads(_broadcast(json.dumps(announcement).encode(), deadline))
    if "error" in announcement:
        raise ConfigError(f"{announcement['error']}; choose another port, or 0 for any free one")
    hosts = ["localhost"] if rank == 0 else announcement["hosts"]
    board = StoreBoard(hosts, announcement["port"], announcement["token"], server)
    ranks = StoreRanks(rank, dist.get_world_size(), board)
    try:
        ranks.exchange("open", Ok(), lambda payloads: b"", deadline=deadline, phase=_PHASE)
    except BaseException:
        ranks.close()
        raise
    return ranks


def _world_size() -> int:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    named = os.environ.get("WORLD_SIZE", "1")
    if named != "1":
        raise ConfigError(
            f"WORLD_SIZE is {named}, but torch.distributed has no process group: call "
            "torch.distributed.init_process_group() before this, or unset WORLD_SIZE for a job of one process"
        )
    return 1


def _own_names() -> list[str]:
    """Names and addresses under which other ranks may reach this host, the likeliest first."""
    names = [os.environ.get("MASTER_ADDR", ""), socket.gethostname()]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Sends nothing: the kernel only picks the interface that leads outside.
            probe.connect(("192.0.2.1", 9))
            names.append(probe.getsockname()[0])
        except OSError:
            pass
    return [name for name in dict.fromkeys([*names, "localhost"]) if name]


def _broadcast(data: bytes, deadline: float) -> bytes:
    """Rank 0's `data` on every rank, by one broadcast of fixed size over the default process group."""
    import torch
    import torch.distributed as dist

    # Bytes in a tensor: broadcast_object_list would pickle.
    padded = torch.frombuffer(bytearray(data.ljust(_ANNOUNCEMENT_BYTES)), dtype=torch.uint8).to(group_device())
    work = dist.broadcast(padded, src=0, async_op=True)
    pause_s = 0.001
    try:
        while work is not None and not work.is_completed():
            if time.monotonic() > deadline:
                raise DeadlineError(
                    f"{_PHASE}: rank 0's address did not come over the process group in time; all ranks must construct "
                    "the checkpointer together",
                    ranks=(0,),
                    phase=_PHASE,
                    waited_for="the address of rank 0's store",
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.02)
        if work is not None:
            work.wait()
    except RuntimeError as error:
        message = f"the process group failed: {str(error).splitlines()[0]}"
        raise RankFailureError(f"{_PHASE}: {message}", ranks=(), phase=_PHASE, messages=(message,)) from error
    return bytes(padded.cpu().tolist()).rstrip()


def group_device(prefer_accelerator: bool = False) -> torch.device:
    """A device whose tensors the default group can move: the CPU, or an accelerator where that is preferred, when it
    can, else the first that it names.
    """
    import torch
    import torch.distributed as dist

    devices = [pair.partition(":")[0] for pair in str(dist.get_backend_config()).split(",")]
    accelerators = [device for device in devices if device != "cpu" and torch.accelerator.is_available()]
    if "cpu" in devices and not (prefer_accelerator and accelerators):
        return torch.device("cpu")
    return torch.device(accelerators[0] if accelerators else devices[0])
