"""Real text that every machine has, and a loader over it that can stop anywhere and go on."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import torch


def library_sources(limit_bytes: int = 4 << 20) -> torch.Tensor:
    """The first `limit_bytes` of the sources of Python's own standard library, in order of their names; 1-D uint8."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= limit_bytes:
            break
    return torch.frombuffer(text, dtype=torch.uint8)[:limit_bytes]


class Windows:
    """Random windows of a text. The batches, in their order, depend on `seed` alone, on any number of ranks.

    `state_dict` holds how many windows were drawn, and the generator that draws the next.
    """

    def __init__(self, text: torch.Tensor, length: int, seed: int) -> None:
        self.text, self.length = text, length
        self.drawn = 0
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The next `count` windows of the whole job and what follows each byte; (count, length) int64 both."""
        starts = torch.randint(len(self.text) - self.length, (count,), generator=self.generator)
        self.drawn += count
        windows = torch.stack([self.text[start : start + self.length + 1] for start in starts.tolist()]).long()
        return windows[:, :-1], windows[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"]
        self.generator.set_state(state["generator"])
