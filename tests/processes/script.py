"""A training script as users have it, for torchrun and for plain python: script.py ROOT LAST SAID

Trains to step LAST, saving at every step. On its first start under an agent rank 1 kills itself in the middle of saving
step 3. Each start adds a line to SAID-<rank>: from which step it went on, and what it held then.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import torch.distributed as dist

from dscheck import Checkpointer
from dscheck.storage import LocalStorage, Storage
from dscheck.testing.faults import Faulty, amid
from tests.processes.training import Kind, build, fingerprint


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(root: str, last: int, said: str) -> None:
    storage: Storage = LocalStorage(root)
    rank = int(os.environ.get("RANK", "0"))
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
        if rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            storage = Faulty(storage, amid(die, "steps/3/*"))
    training = build("fsdp" if dist.is_initialized() else "plain", Kind(), seed=1)
    with Checkpointer(storage, training.state, timeout_s=60.0) as ckpt:
        done = ckpt.load() or 0
        with open(f"{said}-{rank}", "a") as journal:
            print(json.dumps([done, fingerprint([training.holds()])]), file=journal)
        for step in range(done + 1, last + 1):
            training.step()
            ckpt.save(step)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
