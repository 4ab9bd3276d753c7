"""What a save and a load of dscheck reach, through the public API, in a root of their own."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import torch

from dscheck.checkpointer import Checkpointer

TENSORS = 8
SAVES = 2
"""The first one also gets the host memory ready that a training run gets ready once: the second one counts."""


def save_and_load(root: str, nbytes: int, settings: Mapping[str, Any]) -> tuple[float, float]:
    """Seconds of a save until it is committed, and of a load, of `nbytes`. `root` is new. Raises DscheckError."""
    state = {f"tensor{index}": torch.empty(nbytes // TENSORS, dtype=torch.uint8).random_() for index in range(TENSORS)}
    with Checkpointer(root, state, rng=False, **settings) as ckpt:
        for step in range(1, SAVES + 1):
            began = time.perf_counter()
            ckpt.save(step).wait()
            saved_s = time.perf_counter() - began
    _evict(root)
    with Checkpointer(root, state, rng=False, **settings) as ckpt:
        began = time.perf_counter()
        ckpt.load()
        return saved_s, time.perf_counter() - began


def _evict(root: str) -> None:
    for folder, _, names in os.walk(root):
        for name in names:
            fd = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
