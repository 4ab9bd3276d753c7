"""What a forked process, such as a data loader's worker, may do with the capture of its parent: let go of it."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import torch

from dscheck import Checkpointer, ConfigError
from dscheck.config import Settings
from dscheck.snapshot import Capturer, Source
from dscheck.storage.memory import MemoryStorage
from dscheck.testing.faults import Faulty, hang


def test_a_forked_process_may_drop_what_its_parent_captures_with() -> None:
    """Its garbage collector may find it there, and none of the threads are."""
    weight = torch.randn(1 << 20)
    capturer = Capturer(Settings(), lambda owner: 0)
    plan = capturer.plan([weight], [Source("weight", 0, weight)])
    capture = capturer.take(plan, [weight], time.monotonic() + 30)
    capture.hold()
    capture.wait()
    child = os.fork()
    if child == 0:
        del capture
        capturer.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    capture.release()
    capturer.close()


def test_a_forked_process_trains_without_waiting_for_the_saves_of_its_parent() -> None:
    """None of the threads that would copy are there, and what it copied would land in the memory of its parent."""
    weight = torch.nn.Parameter(torch.zeros(1 << 20))
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
    weight.grad = torch.ones_like(weight)
    root, let_go = MemoryStorage(), threading.Event()
    faulty = Faulty(root, hang(let_go, "write", "steps/2/*"))
    small: dict[str, Any] = {"host_memory_bytes": 64 << 10, "block_bytes": 4096, "timeout_s": 60}
    with Checkpointer(faulty, {"weight": weight, "optimizer": optimizer}, **small) as ckpt:
        ckpt.save(1).wait()
        second = ckpt.save(2)
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            optimizer.step()
            ckpt.fence()
            try:
                ckpt.save(3)
            except ConfigError:
                os._exit(0)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        let_go.set()
        second.wait()
    assert ckpt.steps() == [1, 2]
