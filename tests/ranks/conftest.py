"""N ranks in this process, over memory and over a real TCPStore: both must behave alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from dscheck.ranks.base import Ranks
from dscheck.ranks.store import StoreBoard, StoreRanks, host_store
from dscheck.testing.ranks import thread_ranks

MakeRanks = Callable[[int], list[Ranks]]


def store_ranks(n: int) -> list[Ranks]:
    server = host_store(0, "test")
    boards = [StoreBoard(["localhost"], server.port, "test", server if rank == 0 else None) for rank in range(n)]
    return [StoreRanks(rank, n, board) for rank, board in enumerate(boards)]


@pytest.fixture(params=[thread_ranks, store_ranks])
def make_ranks(request: pytest.FixtureRequest) -> Iterator[MakeRanks]:
    """Makes N ranks, and closes them at the end: rank 0 first, since nobody reads any more."""
    made: list[Ranks] = []

    def make(n: int) -> list[Ranks]:
        ranks: list[Ranks] = request.param(n)
        made.extend(ranks)
        return ranks

    yield make
    for ranks in made:
        ranks._linger_s = 0.0  # type: ignore[attr-defined]
        ranks.close()
