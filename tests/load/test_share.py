"""Who reads what: every byte that is wanted by one rank alone or read once for all who want it, in bounded rounds."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dscheck.errors import LayoutError
from dscheck.layout.region import Region
from dscheck.layout.runs import byte_runs
from dscheck.load import share
from dscheck.load.needs import Need, Needs, needs_of
from dscheck.load.reads import reads_of
from dscheck.load.share import Range, Shared, clipped, decode, divided, encode, schedule, table_of, wanted
from dscheck.manifest.fragments import Fragment, Fragments
from dscheck.manifest.keys import LARGEST
from dscheck.manifest.place import SMALL_ALIGNMENT, place
from dscheck.manifest.plan import Plan, RankRow, TensorRow
from tests.load import slow_needs
from tests.load.test_needs import boxes, plan_of

BLOCK = 256
PIECE = 4 * BLOCK


@pytest.fixture(autouse=True, scope="module")
def small_pieces() -> Iterator[None]:
    """As of large tensors."""
    before = share.PIECE_BYTES, share.READ_BYTES_A_ROUND, share.RECEIVED_BYTES_A_ROUND
    share.PIECE_BYTES, share.READ_BYTES_A_ROUND, share.RECEIVED_BYTES_A_ROUND = PIECE, 2 * PIECE, 6 * PIECE
    yield
    share.PIECE_BYTES, share.READ_BYTES_A_ROUND, share.RECEIVED_BYTES_A_ROUND = before


@st.composite
def wants(draw: st.DrawFn) -> tuple[list[Needs], int]:
    """What 1 to 5 ranks want of one tensor in a few row fragments, and its rows."""
    rows, columns = draw(st.integers(1, 30)), draw(st.integers(1, 60))
    cuts = sorted({0, rows, *draw(st.lists(st.integers(0, rows), max_size=3))})
    plan = plan_of((rows, columns), *(Region((a, 0), (b, columns)) for a, b in pairwise(cuts)), block_bytes=BLOCK)
    found = []
    for _ in range(draw(st.integers(1, 5))):
        region = Region.whole((rows, columns))
        if draw(st.booleans()):
            top, left = draw(st.integers(0, rows - 1)), draw(st.integers(0, columns - 1))
            bottom, right = draw(st.integers(top + 1, rows)), draw(st.integers(left + 1, columns))
            region = Region((top, left), (bottom, right))
        found.append(needs_of(plan, [(0, region, None)]))
    return found, rows


def scheduled(ranges: list[list[Range]]) -> list[Shared]:
    """The schedule of what ranks tell each other."""
    return schedule([decode(encode(table_of(of_rank))) for of_rank in ranges])


def ranges_of(needs: Needs) -> list[Range]:
    return [Range(*row) for row in wanted(needs).tolist()]


def bytes_of(needs: Iterable[Need]) -> Counter[tuple[int, int]]:
    """How often each byte of each data file is placed."""
    found: Counter[tuple[int, int]] = Counter()
    for need in needs:
        for offset, length in byte_runs(need.fragment.region, need.box, 4):
            found.update((need.fragment.writer, need.fragment.offset + offset + i) for i in range(length))
    return found


@given(wants())
def test_each_rank_gets_each_byte_once_whoever_reads_it(case: tuple[list[Needs], int]) -> None:
    needs, _ = case
    ranges = list(map(ranges_of, needs))
    shared = scheduled(ranges)
    assert all(one.reader in one.members and len(one.members) > 1 for one in shared)
    read: Counter[Range] = Counter(one.range for one in shared)
    assert set(read.values()) <= {1}
    for rank, of_rank in enumerate(needs):
        mine = [one.range for one in shared if rank in one.members]
        private, reads = divided(of_rank, table_of(mine))
        assert bytes_of([*private, *(need for read in reads for need in read.needs)]) == bytes_of(of_rank)
        assert [(read.file, read.start, read.stop) for read in reads] == [(r.file, r.start, r.stop) for r in mine]
        for read_ in reads:
            for start, stop in zip(*read_.needs.extents(), strict=True):
                assert read_.start <= start
                assert stop <= read_.stop
        others = {
            (r.file, b) for one in ranges if one is not ranges[rank] for r in one for b in range(r.start, r.stop, 64)
        }
        for read_ in reads_of(private):
            for start, stop in zip(*read_.needs.extents(), strict=True):
                assert not {(read_.file, b) for b in range(start, stop, 64)} & others, "read by others as well"


@given(wants())
def test_what_a_rank_wants_is_that_of_one_need_after_the_other(case: tuple[list[Needs], int]) -> None:
    for needs in case[0]:
        assert wanted(needs).tolist() == slow_needs.ranges(needs, PIECE, PIECE, SMALL_ALIGNMENT)


@given(wants())
def test_rounds_are_bounded_and_come_in_order(case: tuple[list[Needs], int]) -> None:
    ranges = list(map(ranges_of, case[0]))
    shared = scheduled(ranges)
    assert all(one.range.nbytes < 2 * PIECE + BLOCK for one in shared)
    reads, received = defaultdict(list), defaultdict(list)
    for one in shared:
        reads[one.reader, one.round].append(one.range.nbytes)
        for member in one.members:
            if member != one.reader:
                received[member, one.round].append(one.range.nbytes)
    for sizes in reads.values():
        assert len(sizes) <= share.READS_A_ROUND
        assert len(sizes) == 1 or sum(sizes) <= share.READ_BYTES_A_ROUND
    assert all(len(sizes) == 1 or sum(sizes) <= share.RECEIVED_BYTES_A_ROUND for sizes in received.values())
    for rank in range(len(ranges)):
        rounds = [one.round for one in shared if one.reader == rank]
        assert rounds == sorted(rounds)


def test_replicas_share_evenly_and_a_rank_with_much_of_its_own_reads_less_for_others() -> None:
    plan = plan_of((4000, 256), Region((0, 0), (4000, 256)), block_bytes=BLOCK)
    whole = [Range(0, start, start + PIECE) for start in range(0, 400_000, PIECE)]
    shared = scheduled([whole] * 8)
    loads = Counter(one.reader for one in shared)
    assert max(loads.values()) - min(loads.values()) <= 1
    assert ranges_of(needs_of(plan, [(0, Region.whole((4000, 256)), None)]))[0].nbytes == PIECE
    private = [Range(1, start, start + PIECE) for start in range(0, 100_000, PIECE)]
    loads = Counter(one.reader for one in scheduled([whole, [*whole, *private]]))
    assert loads[0] - loads[1] == pytest.approx(len(private), abs=1)


def test_nothing_wanted_twice_is_nothing_shared() -> None:
    assert scheduled([[Range(0, 0, 100)], [Range(0, 100, 200)], [], [Range(1, 0, 100)]]) == []
    assert scheduled([[], []]) == []
    assert scheduled([]) == []


def test_each_part_goes_to_those_who_want_it() -> None:
    shared = scheduled([[Range(3, 0, 100)], [Range(3, 50, 150), Range(7, 0, 10)], [Range(7, 0, 5), Range(9, 0, 1)]])
    assert [(one.range, one.members) for one in shared] == [(Range(3, 50, 100), (0, 1)), (Range(7, 0, 5), (1, 2))]


def test_files_beyond_all_bounds_are_refused() -> None:
    with pytest.raises(LayoutError, match=r"2\*\*63"):
        scheduled([[Range(0, 0, LARGEST)], [Range(1, 0, LARGEST)]])


def test_small_tensors_side_by_side_are_one_range_with_what_aligns_them() -> None:
    offsets, blocks, _ = place([12] * 100, BLOCK)
    region = Region((0,), (3,))
    fragments = Fragments.of([Fragment(i, region, 0, offsets[i], 12, blocks[i], 0) for i in range(100)])
    tensors = tuple(TensorRow(f"w{i:02}", "float32", (3,)) for i in range(100))
    plan = Plan(tensors, fragments, (RankRow(0, "host"),), ((0,),), BLOCK)
    found = ranges_of(needs_of(plan, [(i, region, None) for i in range(100)]))
    assert len(found) == -(-100 * 64 // PIECE)
    assert (found[0].start, found[-1].stop) == (0, 99 * 64 + 12)
    assert all(before.stop == after.start - 52 for before, after in pairwise(found))
    without = ranges_of(needs_of(plan, [(i, region, None) for i in range(100) if i != 10]))
    assert Range(0, 10 * 64, 10 * 64 + 12) not in without
    assert without[0].stop == 9 * 64 + 12, "what nobody wants is not joined over"


@given(boxes(), st.data())
def test_a_clipped_need_is_the_part_in_those_blocks(case: tuple[tuple[int, ...], Region], data: st.DataObject) -> None:
    shape, region = case
    needs = needs_of(plan_of(shape, Region.whole(shape), block_bytes=BLOCK), [(0, region, None)])
    cut = data.draw(st.integers(0, 40)) * BLOCK
    bounds = ((0, cut), (cut, 1 << 40))
    parts = [part for i in range(len(needs)) for bound in bounds for part in clipped(needs[i : i + 1], *bound)]
    assert sum(part.box.numel for part in parts) == region.numel
    for part in parts:
        for offset, length in byte_runs(Region.whole(shape), part.box, 4):
            assert (offset < cut) == (part.first * BLOCK < cut)
            assert offset + length <= cut or offset >= cut
