"""The host side of a capture: one reusable region that holds what this rank writes of one step."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

ALIGN = 64


class Arena:
    """Host memory of one rank, reused from save to save and grown when the state grew. One capture at a time owns
    it.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self.grow_s = 0.0

    @property
    def nbytes(self) -> int:
        return self._memory.numel()

    def carve(self, sizes: Sequence[int], *, pinned: bool) -> list[torch.Tensor]:
        """One 64-byte aligned uint8 slice for each size. The slices of an earlier call are invalid from here on."""
        offsets, end = [], 0
        for size in sizes:
            offsets.append(end)
            end += -(-size // ALIGN) * ALIGN
        began = time.perf_counter()
        if end > self.nbytes or (pinned and not self._memory.is_pinned()):
            self._memory = torch.empty(0, dtype=torch.uint8)  # let go first: two regions at once would break the budget
            self._memory = torch.empty(end, dtype=torch.uint8, pin_memory=pinned and end > 0)
        self.grow_s = time.perf_counter() - began
        return [self._memory[offset : offset + size] for offset, size in zip(offsets, sizes, strict=True)]
