"""From regions to reads: every needed byte, few others, in bounded requests."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dscheck.errors import IncompleteCoverError
from dscheck.layout.region import Region
from dscheck.layout.runs import byte_runs
from dscheck.load.needs import GAP_BYTES, READ_BYTES, needs_of, reads_of
from dscheck.manifest.fragments import Fragment, Fragments
from dscheck.manifest.place import place
from dscheck.manifest.plan import Plan, RankRow, TensorRow

BLOCK = 4096


def plan_of(shape: tuple[int, ...], *regions: Region, block_bytes: int = BLOCK) -> Plan:
    """One float32 tensor in these fragments, each written by its own rank."""
    sizes = [region.numel * 4 for region in regions]
    fragments = []
    for rank, (region, size) in enumerate(zip(regions, sizes, strict=True)):
        offsets, blocks, _ = place([size], block_bytes)
        fragments.append(Fragment(0, region, rank, offsets[0], size, blocks[0], rank))
    ranks = tuple(RankRow(rank, "host") for rank in range(len(regions)))
    holders = tuple((rank,) for rank in range(len(regions)))
    return Plan((TensorRow("w", "float32", shape),), Fragments.of(fragments), ranks, holders, block_bytes)


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Region]:
    shape = tuple(draw(st.lists(st.integers(1, 60), min_size=1, max_size=4)))
    starts = [draw(st.integers(0, n - 1)) for n in shape]
    stops = [draw(st.integers(a + 1, n)) for a, n in zip(starts, shape, strict=True)]
    return shape, Region(tuple(starts), tuple(stops))


@given(boxes())
def test_the_blocks_read_hold_every_byte_of_the_box(case: tuple[tuple[int, ...], Region]) -> None:
    shape, wanted = case
    plan = plan_of(shape, Region.whole(shape))
    needs = list(needs_of(plan, 0, wanted, None))
    assert sum(need.box.numel for need in needs) == wanted.numel
    for need in needs:
        for offset, length in byte_runs(Region.whole(shape), need.box, 4):
            assert need.first * BLOCK <= offset
            assert offset + length <= need.last * BLOCK
    covered = reads_of(needs, BLOCK)
    assert sum(len(read.needs) for read in covered) == len(needs)
    for read in covered:
        assert read.stop - read.start <= READ_BYTES
        for need in read.needs:
            start, stop = need.extent(BLOCK)
            assert read.start <= start < stop <= read.stop


def test_a_narrow_column_of_a_wide_matrix_skips_what_lies_between() -> None:
    """Byte ranges only: rows of 1 MiB, 4 KiB wanted of each."""
    shape = (64, 1 << 18)
    needs = list(needs_of(plan_of(shape, Region.whole(shape)), 0, Region((0, 0), (64, 1024)), None))
    read = sum(r.stop - r.start for r in reads_of(needs, BLOCK))
    assert read == 64 * BLOCK


def test_rows_of_a_fragment_read_those_rows_alone() -> None:
    shape = (1000, 1024)
    needs = list(needs_of(plan_of(shape, Region.whole(shape)), 0, Region((500, 0), (510, 1024)), None))
    assert sum(r.stop - r.start for r in reads_of(needs, BLOCK)) == 10 * 4096


def test_no_read_is_longer_than_the_bound() -> None:
    shape = (100, 1 << 20)
    plan = plan_of(shape, Region.whole(shape), block_bytes=256 << 10)
    reads = reads_of(needs_of(plan, 0, Region.whole(shape), None), plan.block_bytes)
    assert max(read.stop - read.start for read in reads) <= READ_BYTES
    assert sum(read.stop - read.start for read in reads) == math.prod(shape) * 4


def test_near_ranges_of_one_file_are_one_read_and_far_ones_are_not() -> None:
    shape = (300, 1024)
    plan = plan_of(shape, Region.whole(shape))
    near = [*needs_of(plan, 0, Region((0, 0), (1, 1024)), None), *needs_of(plan, 0, Region((9, 0), (10, 1024)), None)]
    far_row = 2 + GAP_BYTES // 4096
    far = [near[0], *needs_of(plan, 0, Region((far_row, 0), (far_row + 1, 1024)), None)]
    assert len(reads_of(near, BLOCK)) == 1
    assert len(reads_of(far, BLOCK)) == 2


def test_a_region_that_no_fragment_holds_is_refused_with_the_missing_box() -> None:
    plan = plan_of((10,), Region((0,), (4,)), Region((6,), (10,)))
    with pytest.raises(IncompleteCoverError, match="'w'") as caught:
        list(needs_of(plan, 0, Region((2,), (8,)), None))
    assert caught.value.missing == Region((4,), (6,))
