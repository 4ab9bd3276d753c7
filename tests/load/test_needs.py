"""From regions to reads: every needed byte, few others, in bounded requests."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dscheck.errors import IncompleteCoverError
from dscheck.layout import prove_cover
from dscheck.layout.region import Region
from dscheck.layout.runs import byte_runs
from dscheck.load import needs as needs_module
from dscheck.load import reads as reads_module
from dscheck.load.needs import READ_BYTES, Needs, needs_of
from dscheck.load.reads import GAP_BYTES, Reads, reads_of
from dscheck.manifest.fragments import Fragment, Fragments
from dscheck.manifest.place import place
from dscheck.manifest.plan import Plan, RankRow, TensorRow
from tests.layout.boxes import boxes_in, shapes, tilings
from tests.load import slow_needs

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
    needs = needs_of(plan, [(0, wanted, None)])
    assert sum(need.box.numel for need in needs) == wanted.numel
    for need in needs:
        for offset, length in byte_runs(Region.whole(shape), need.box, 4):
            assert need.first * BLOCK <= offset
            assert offset + length <= need.last * BLOCK
    assert needs.nbytes == wanted.numel * 4
    covered = reads_of(needs)
    assert sum(len(read.needs) for read in covered) == len(needs)
    for read in covered:
        assert read.stop - read.start <= READ_BYTES
        for start, stop in zip(*read.needs.extents(), strict=True):
            assert read.start <= start < stop <= read.stop


@given(st.data())
def test_needs_are_those_of_each_fragment(data: st.DataObject) -> None:
    """All that overlaps, once, in boxes within the blocks that are said to hold them."""
    cuts = data.draw(st.lists(shapes.flatmap(lambda s: st.tuples(st.just(s), tilings(s))), min_size=1, max_size=3))
    plan = joined([plan_of(shape, *sorted(tiles), block_bytes=8) for shape, tiles in cuts])
    wanted = []
    for number in data.draw(st.lists(st.integers(0, len(cuts) - 1), max_size=4)):
        wanted.append((number, data.draw(boxes_in(Region.whole(cuts[number][0]), empty=True)), len(wanted)))
    found = needs_of(plan, wanted)
    for tensor, region, target in wanted:
        mine = [need for need in found if need.target == target]
        assert all(need.row == plan.tensors[tensor] and need.fragment.tensor == tensor for need in mine)
        expected = slow_needs.needs(plan, tensor, region)
        by_writer = {writer: [need for need in mine if need.fragment.writer == writer] for writer, _, _ in expected}
        assert sum(map(len, by_writer.values())) == len(mine)
        for writer, box, blocks in expected:
            parts = by_writer[writer]
            assert sum(part.box.numel for part in parts) == box.numel
            prove_cover("box", box.shape, [part.box.relative_to(box.start) for part in parts])
            read = {block for part in parts for block in range(part.first, part.last)}
            assert blocks <= read
            assert len(parts) == 1 or read == blocks or len(read) <= 3 * len(blocks)


def joined(parts: list[Plan]) -> Plan:
    """The tensors of all parts, each written by ranks of its own."""
    ranks = [len(part.ranks) for part in parts]
    before = [sum(ranks[:i]) for i in range(len(parts))]
    rows = [
        replace(row, tensor=i, writer=row.writer + before[i], holders=row.holders + before[i])
        for i, part in enumerate(parts)
        for row in part.fragments
    ]
    tensors = tuple(replace(part.tensors[0], name=f"w{i}") for i, part in enumerate(parts))
    everyone = range(sum(ranks))
    return Plan(
        tensors,
        Fragments.of(rows),
        tuple(RankRow(rank, "host") for rank in everyone),
        tuple((rank,) for rank in everyone),
        parts[0].block_bytes,
    )


def test_a_narrow_column_of_a_wide_matrix_skips_what_lies_between() -> None:
    """Byte ranges only: rows of 1 MiB, 4 KiB wanted of each."""
    shape = (64, 1 << 18)
    needs = needs_of(plan_of(shape, Region.whole(shape)), [(0, Region((0, 0), (64, 1024)), None)])
    assert reads_of(needs).nbytes == 64 * BLOCK


def test_rows_of_a_fragment_read_those_rows_alone() -> None:
    shape = (1000, 1024)
    needs = needs_of(plan_of(shape, Region.whole(shape)), [(0, Region((500, 0), (510, 1024)), None)])
    assert reads_of(needs).nbytes == 10 * 4096


def test_no_read_is_longer_than_the_bound() -> None:
    shape = (100, 1 << 20)
    plan = plan_of(shape, Region.whole(shape), block_bytes=256 << 10)
    reads = reads_of(needs_of(plan, [(0, Region.whole(shape), None)]))
    assert max(read.stop - read.start for read in reads) <= READ_BYTES
    assert reads.nbytes == math.prod(shape) * 4


def test_near_ranges_of_one_file_are_one_read_and_far_ones_are_not() -> None:
    shape = (300, 1024)
    plan = plan_of(shape, Region.whole(shape))
    far_row = 2 + GAP_BYTES // 4096
    near = needs_of(plan, [(0, Region((row, 0), (row + 1, 1024)), None) for row in (0, 9)])
    far = needs_of(plan, [(0, Region((row, 0), (row + 1, 1024)), None) for row in (0, far_row)])
    assert len(reads_of(near)) == 1
    assert len(reads_of(far)) == 2


@pytest.fixture
def short_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a few blocks, as those of large tensors are."""
    for module in (needs_module, reads_module, slow_needs):
        monkeypatch.setattr(module, "READ_BYTES", 200)
    for module in (reads_module, slow_needs):
        monkeypatch.setattr(module, "GAP_BYTES", 24)


@st.composite
def wants(draw: st.DrawFn) -> Needs:
    """What one rank wants of a few tensors, some of it twice."""
    cuts = draw(st.lists(shapes.flatmap(lambda s: st.tuples(st.just(s), tilings(s))), min_size=1, max_size=3))
    plan = joined([plan_of(shape, *sorted(tiles), block_bytes=8) for shape, tiles in cuts])
    plan = one_file(plan) if draw(st.booleans()) else plan
    numbers = draw(st.lists(st.integers(0, len(cuts) - 1), max_size=4))
    return needs_of(plan, [(n, draw(boxes_in(Region.whole(cuts[n][0]), empty=True)), None) for n in numbers])


def one_file(plan: Plan) -> Plan:
    """The same fragments, all written by rank 0."""
    rows = list(plan.fragments)
    offsets, blocks, _ = place([row.nbytes for row in rows], plan.block_bytes)
    placed = zip(rows, offsets, blocks, strict=True)
    rows = [replace(row, writer=0, holders=0, offset=offset, first_block=block) for row, offset, block in placed]
    return replace(plan, fragments=Fragments.of(rows))


@pytest.mark.usefixtures("short_reads")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wants())
def test_reads_are_those_of_one_need_after_the_other(needs: Needs) -> None:
    found = reads_of(needs)
    assert [(read.file, read.start, read.stop, len(read.needs)) for read in found] == slow_needs.reads(needs)
    assert Counter(map(str, needs)) == Counter(str(need) for read in found for need in read.needs)
    turned = Reads.joined(found, found).take(np.arange(2 * len(found))[::-1])
    assert [(read.file, read.start, list(read.needs)) for read in turned] == [
        (read.file, read.start, list(read.needs)) for read in [*found, *found][::-1]
    ]


def test_a_region_that_no_fragment_holds_is_refused_with_the_missing_box() -> None:
    plan = plan_of((10,), Region((0,), (4,)), Region((6,), (10,)))
    with pytest.raises(IncompleteCoverError, match="'w'") as caught:
        needs_of(plan, [(0, Region((2,), (8,)), None)])
    assert caught.value.missing == Region((4,), (6,))
