"""What a load did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LoadReport:
    """The step that the live state now is, and how it got there, on this rank.

    `root`: the storage that it was read from; `missing`: live names that the checkpoint does not have (empty unless
    strict=False); `unexpected`: saved names below the wanted ones that nothing live took; `rng`: "exact" on the same
    number of ranks, "equivalent" on another, "none";
    `bytes`: wanted bytes of tensors; `bytes_read`: read from storage for them by this rank, plan, checksums and objects
    included; `bytes_received`: what other ranks had read and passed on. `index_bytes_read` and `index_bytes_received`
    are what of these came before the first tensor: history, plan, files, objects, checksums. Over all ranks:
    `bytes_read_by_all`, and `bytes_wanted_once`, which counts what several ranks want once. `phase_s`: seconds by phase
    ("plan": the decision and the proof, "share": who reads what, "read": reading, passing on and placing, "finish":
    objects, agreement).
    """

    step: int
    term: int
    root: str
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    rng: str
    bytes: int
    bytes_read: int
    bytes_received: int
    index_bytes_read: int
    index_bytes_received: int
    bytes_read_by_all: int
    bytes_wanted_once: int
    seconds: float
    phase_s: Mapping[str, float]

    @property
    def read_ratio(self) -> float:
        """What all ranks read, against what they want, counted once."""
        return self.bytes_read_by_all / max(1, self.bytes_wanted_once)
