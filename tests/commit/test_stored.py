"""Plans in a storage: read in part, each part proved first, and the same fragments as the whole has."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dscheck.commit import put_plan
from dscheck.commit.stored import StoredPlan
from dscheck.errors import CorruptCheckpointError
from dscheck.layout.region import Region
from dscheck.manifest.fragments import Fragment, Fragments
from dscheck.manifest.plan import Plan, RankRow, TensorRow
from dscheck.storage.memory import MemoryStorage
from dscheck.testing.faults import Faulty
from tests.layout.boxes import boxes_in
from tests.manifest.plans import plans
from tests.manifest.stored import encoded, stored


def rows_of(ranks: int, tensors: int = 3) -> Plan:
    """Each tensor in one row a rank."""
    return Plan(
        tuple(TensorRow(f"t{i}", "int8", (ranks, 64)) for i in range(tensors)),
        Fragments.of(
            Fragment(i, Region((rank, 0), (rank + 1, 64)), rank, 64 * i, 64, i, rank)
            for i in range(tensors)
            for rank in range(ranks)
        ),
        tuple(RankRow(rank, "host") for rank in range(ranks)),
        tuple((rank,) for rank in range(ranks)),
        64,
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plans(), st.integers(1, 4), st.data())
def test_what_overlaps_a_region_is_what_a_look_at_all_fragments_finds(
    plan: Plan, batch_rows: int, data: st.DataObject
) -> None:
    wanted: list[tuple[int, Region]] = []
    for number in data.draw(st.lists(st.integers(0, len(plan.tensors) - 1), max_size=4)) if plan.tensors else []:
        shape = tuple(min(size, 50) for size in plan.tensors[number].shape)
        wanted.append((number, data.draw(boxes_in(Region.whole(shape), empty=True))))
    expected = [
        [row for row in plan.fragments_of(tensor) if (box := row.region.intersect(region)) is not None and box.numel]
        for tensor, region in wanted
    ]
    for found in (plan, stored(plan, batch_rows)):
        rows, want = found.overlapping(wanted)
        assert list(rows) == list(chain.from_iterable(expected))
        assert want.tolist() == [number for number, some in enumerate(expected) for _ in some]


def test_a_rank_reads_the_head_and_the_batches_that_it_needs() -> None:
    plan = rows_of(6000)
    storage = Faulty(MemoryStorage())
    digest = put_plan(storage, 1, encoded(plan, 1000))
    found = StoredPlan(storage, 1, digest)
    assert (storage.count("read"), found.bytes_read) == (1, digest.size)
    wanted = [(number, Region((2500, 0), (2501, 64))) for number in range(3)]
    assert [row.writer for row in found.overlapping(wanted)[0]] == [2500] * 3
    sizes = found.head.directory.size.reshape(3, 6)
    assert found.bytes_read == digest.size + int(sizes[:, 2].sum()) + int(sizes[:2, 3:].sum()) + int(
        sizes[1:, :2].sum()
    )
    assert found.bytes_read < found.size
    assert storage.count("read") == 2, "what lies near is read together"


def test_far_batches_are_read_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dscheck.commit.parts.GAP_BYTES", 100)
    storage = Faulty(MemoryStorage())
    found = StoredPlan(storage, 1, put_plan(storage, 1, encoded(rows_of(6000), 1000)))
    before = found.bytes_read
    found.overlapping([(number, Region((2500, 0), (2501, 64))) for number in range(3)])
    sizes = found.head.directory.size.reshape(3, 6)
    assert (storage.count("read"), found.bytes_read - before) == (4, int(sizes[:, 2].sum()))


def test_no_read_of_batches_is_longer_than_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dscheck.commit.parts.READ_BYTES", 1)
    storage, plan = Faulty(MemoryStorage()), rows_of(50)
    found = StoredPlan(storage, 1, put_plan(storage, 1, encoded(plan, 10)))
    assert found.whole() == plan
    assert storage.count("read") == 1 + len(found.head.directory) == 16


def test_a_flipped_bit_in_any_part_is_noticed_before_it_is_decoded() -> None:
    """format F24, F101; TRAPS 36"""
    plan = encoded(rows_of(40), 10)
    for at in np.random.default_rng(5).integers(0, len(plan.data), 60).tolist():
        data = bytearray(plan.data)
        data[at] ^= 1 << at % 8
        storage = MemoryStorage()
        storage.put_if_absent(f"plans/1-{plan.head.sha256}.arrow", bytes(data))
        with pytest.raises(CorruptCheckpointError, match="SHA-256") as caught:
            StoredPlan(storage, 1, plan.head).whole()
        assert caught.value.fields["offset"] <= at


def test_a_truncated_plan_is_refused() -> None:
    plan, storage = encoded(rows_of(40), 10), MemoryStorage()
    storage.put_if_absent(f"plans/1-{plan.head.sha256}.arrow", plan.data[:-1])
    with pytest.raises(CorruptCheckpointError):
        StoredPlan(storage, 1, plan.head).whole()
