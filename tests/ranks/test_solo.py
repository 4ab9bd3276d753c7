from __future__ import annotations

import pytest

from dscheck.errors import RankFailureError
from dscheck.ranks import Failed, Ok, Ranks, Solo


def test_a_single_rank_decides_for_itself() -> None:
    ranks: Ranks = Solo()
    assert (ranks.rank, ranks.size) == (0, 1)
    assert ranks.exchange("a", Ok(b"x"), lambda payloads: payloads[0] * 2, deadline=0.0, phase="plan") == b"xx"
    ranks.close()


def test_what_decide_raises_comes_through() -> None:
    raised = KeyError("w")

    def decide(payloads: object) -> bytes:
        raise raised

    with pytest.raises(KeyError) as caught:
        Solo().exchange("a", Ok(), decide, deadline=0.0, phase="plan")
    assert caught.value is raised


def test_a_failed_single_rank_raises_its_own_failure() -> None:
    with pytest.raises(RankFailureError, match="plan: rank 0 failed: disk full") as caught:
        Solo().exchange("a", Failed("disk full"), lambda payloads: b"", deadline=0.0, phase="plan")
    assert caught.value.fields == {"ranks": (0,), "phase": "plan", "round": "a", "messages": ("disk full",)}
