"""What dscheck asks of a group of ranks: one primitive, `exchange`, over which saves and loads agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Ok:
    """This rank is ready; `payload` is its small message to the coordinator."""

    payload: bytes = b""


@dataclass(frozen=True, slots=True)
class Failed:
    """This rank cannot go on. The others raise RankFailureError with `message`, which names the error."""

    message: str


class Ranks(Protocol):
    """The ranks of one job. Rank 0 coordinates. No method touches a process group (C10)."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def exchange(
        self,
        round: str,
        mine: Ok | Failed,
        decide: Callable[[Sequence[bytes]], bytes],
        *,
        deadline: float,
        phase: str,
    ) -> bytes:
        """Post `mine`, let rank 0 run `decide` on all payloads in rank order, and return its answer on every rank.

        `round` names the exchange once and for all in the life of the job ("save-7/plan"); `deadline` is on
        time.monotonic(); `phase` is what an error calls it ("plan of step 300").
        Raises RankFailureError on every other rank when one posts Failed (at once: nobody waits for the rest) or when
        the coordinator cannot be reached; the DscheckError that `decide` raised, with its type and fields, on all
        ranks; DeadlineError with all absent ranks when the deadline passes. A rank that posted Failed gets
        RankFailureError too.
        """

    def close(self) -> None:
        """Drop connections. Idempotent; never raises."""
