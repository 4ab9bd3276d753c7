"""The demo's training script with a rank that kills itself in the middle of a save, half way in its data file.

torchrun ... -m benchmarks.demo_killed RANK STEP and the arguments of benchmarks.demo_train
"""

from __future__ import annotations

import os
import signal
import sys

from benchmarks import demo_train
from dscheck.storage import open_storage
from dscheck.storage.base import Storage
from dscheck.testing.faults import Faulty, Operation, amid


def dying(root: str, rank: int, step: int) -> Storage:
    """The storage of `root`, in which this process dies in `step` after half as many bytes as its last save wrote."""
    storage = open_storage(root)
    name = f"/data-{rank}.bin"

    def die_half_way(write: Operation) -> None:
        half = max(entry.size for entry in storage.list("steps/") if entry.key.endswith(name)) // 2
        if write.offset + write.nbytes // 2 >= 0.9 * half:
            os.kill(os.getpid(), signal.SIGKILL)

    return Faulty(storage, amid(die_half_way, f"steps/{step}/*{name}", times=None))


if __name__ == "__main__":
    rank, step = int(sys.argv.pop(1)), int(sys.argv.pop(1))
    demo_train.main(lambda root: dying(root, rank, step) if os.environ["RANK"] == str(rank) else root)
