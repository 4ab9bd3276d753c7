"""A clean process to fork others from: it has imported what costs seconds, and runs no thread.

Forking pytest's own process is not sound once tests have started threads in it: children crashed in the handlers that
torch and pyarrow run at a fork.
"""

from __future__ import annotations

import multiprocessing

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "torch._dynamo",
        "dscheck",
        "dscheck.testing",
        "pyarrow",
    ]
)
