"""The ranks of a job that has only one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dscheck.errors import RankFailureError
from dscheck.ranks.base import Failed, Ok


class Solo:
    """One rank that is its own coordinator: an exchange is a call of `decide`, and nothing is waited for."""

    rank = 0
    size = 1

    def exchange(
        self,
        round: str,
        mine: Ok | Failed,
        decide: Callable[[Sequence[bytes]], bytes],
        *,
        deadline: float,
        phase: str,
    ) -> bytes:
        """What `decide` returns or raises. Raises RankFailureError when `mine` is Failed."""
        if isinstance(mine, Failed):
            raise RankFailureError(
                f"{phase}: rank 0 failed: {mine.message}",
                ranks=(0,),
                phase=phase,
                round=round,
                messages=(mine.message,),
            )
        return decide([mine.payload])

    def close(self) -> None:
        """There is nothing to drop."""
