"""What a load did."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LoadReport:
    """The step that the live state now is, and how it got there, on this rank.

    `missing`: live names that the checkpoint does not have (empty unless strict=False); `unexpected`: saved names below
    the wanted ones that nothing live took; `rng`: "exact" on the same number of ranks, "equivalent" on another, "none";
    `bytes`: wanted bytes of tensors; `bytes_read`: read from storage for them, plan and checksums included.
    """

    step: int
    term: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    rng: str
    bytes: int
    bytes_read: int
    seconds: float
