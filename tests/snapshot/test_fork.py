"""What a forked process, such as a data loader's worker, may do with the capture of its parent: let go of it."""

from __future__ import annotations

import os
import time

import torch

from dscheck.config import Settings
from dscheck.snapshot import Capturer, Source


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
