"""The merge in columns against the merge region by region, over right and contradictory claims of all kinds."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dscheck.errors import LayoutError, StateError
from dscheck.layout import Region, flat_range_boxes
from dscheck.layout import boxes as columns
from dscheck.save.claims import Claim, RankClaims
from dscheck.save.merge import merge
from tests.layout.boxes import shapes, tilings
from tests.save import slow_merge

large = st.sampled_from([(600, 700), (1 << 20,), (3, 5, 40_000)])


@st.composite
def world(draw: st.DrawFn) -> list[list[Claim]]:
    """What each rank claims: tensors cut in any way over groups of replicas, with now and then a contradiction."""
    ranks = draw(st.integers(1, 6))
    claims: list[list[Claim]] = [[] for _ in range(ranks)]
    for name in sorted(draw(st.sets(st.sampled_from("abcdé\U00010000"), max_size=4))):
        shape, dtype = draw(shapes | large), draw(st.sampled_from(["float32", "int8"]))
        proof = draw(st.sampled_from(["mesh", "mesh", "mesh", "claim"]))
        groups, held = draw(_groups(ranks)), draw(_cut(shape))
        together = draw(st.booleans())
        for number, group in enumerate(groups):
            mine = tuple(held if together else held[number :: len(groups)])
            for rank in group:
                holders = (rank,) if proof == "claim" else tuple(group)
                claims[rank].append(Claim(name, dtype, shape, mine, holders, proof))
    for _ in range(draw(st.integers(0, 1))):
        rank = draw(st.sampled_from(claims))
        if rank:
            at = draw(st.integers(0, len(rank) - 1))
            changed = draw(_changed(rank[at], ranks))
            rank[at : at + 1] = [changed] if changed else []
    return claims


@st.composite
def _groups(draw: st.DrawFn, ranks: int) -> list[list[int]]:
    order = draw(st.permutations(range(ranks)))
    cuts = sorted({0, ranks, *draw(st.lists(st.integers(0, ranks), max_size=3))})
    return [sorted(order[a:b]) for a, b in pairwise(cuts)]


@st.composite
def _cut(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Region]:
    if draw(st.booleans()):
        cuts = sorted({0, size := Region.whole(shape).numel, *draw(st.lists(st.integers(0, size), max_size=4))})
        return [box for a, b in pairwise(cuts) for box in flat_range_boxes(shape, a, b)]
    return list(draw(tilings(shape)))


@st.composite
def _changed(draw: st.DrawFn, claim: Claim, ranks: int) -> Claim | None:
    how = draw(st.sampled_from(["gone", "dtype", "shape", "holders", "order", "less", "more", "empty"]))
    if how == "gone":
        return None
    regions, holders, dtype, shape = list(claim.regions), claim.holders, claim.dtype, claim.shape
    if how == "dtype":
        dtype = "int32"
    elif how == "shape":
        shape = (*shape, 2)
    elif how == "holders":
        holders = tuple(sorted(draw(st.sets(st.integers(0, ranks - 1)))))
    elif how == "order":
        regions.reverse()
    elif how == "less":
        regions = regions[1:]
    else:
        size = draw(st.integers(0, 4)) if how == "more" else 0
        start = tuple(draw(st.integers(0, 9)) for _ in shape)
        regions.append(Region(start, tuple(a + size for a in start)))
    return Claim(claim.name, dtype, shape, tuple(regions), holders, claim.proof)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(world())
def test_the_merge_in_columns_is_that_of_regions(claims: list[list[Claim]]) -> None:
    ranks = [RankClaims.of("host", (), rows) for rows in claims]
    try:
        slow = slow_merge.merge(claims, 4096)
    except (StateError, LayoutError) as error:
        with pytest.raises(type(error)):
            merge(ranks, 4096)
        return
    merged = merge(ranks, 4096)
    merged.plan.validate()
    assert list(merged.plan.tensors) == slow.tensors
    assert list(merged.plan.fragments) == slow.fragments
    assert list(merged.plan.holders) == slow.holders
    assert merged.exceptions == slow.exceptions
    assert set(merged.rivals.regions) == slow.claimants.keys()
    filled = {key: found for key, found in slow.claimants.items() if key[1].numel}
    assert [key for key in merged.rivals.regions if key[1].numel] == sorted(filled)
    rows = merged.rivals.rows_by_rank(len(claims))
    for rank, mine in enumerate(claims):
        keys = [(claim.name, region) for claim in mine for region in claim.regions]
        assert [keys[row] for row in rows[rank]] == [
            (claim.name, region)
            for claim in mine
            for region in claim.regions
            if rank in claim.holders and rank in slow.claimants.get((claim.name, region), ())
        ]


def test_a_merge_in_many_parts_is_that_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        [
            Claim(f"t{i}", "float32", (8, 3), (Region((2 * rank, 0), (2 * rank + 2, 3)),), (rank,), "mesh")
            for i in range(9)
        ]
        for rank in range(4)
    ]
    ranks = [RankClaims.of("host", (), claims) for claims in rows]
    whole = merge(ranks, 4096).plan
    for most in (1, 7, 24, 50):
        monkeypatch.setattr(columns, "MAX_ITEMS", most)
        monkeypatch.setattr("dscheck.save.merge.MAX_ITEMS", most)
        monkeypatch.setattr("dscheck.manifest.rules.MAX_ITEMS", most)
        monkeypatch.setattr("dscheck.manifest.place.MAX_ITEMS", most)
        parts = merge(ranks, 4096).plan
        parts.validate()
        assert parts == whole
        assert list(parts.untiled()) == []
    assert np.array_equal(whole.fragments.tensor, np.repeat(np.arange(9), 4))
