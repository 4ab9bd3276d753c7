"""The cover proof against NumPy, which counts how often each element is covered."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterable, Sequence
from itertools import pairwise, product

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dscheck.errors import IncompleteCoverError, LayoutError
from dscheck.layout import Region, flat_range_boxes, prove_cover, uncovered
from tests.layout.boxes import boxes_in, pinwheel, shapes, tilings


def times_covered(shape: Sequence[int], regions: Iterable[Region]) -> npt.NDArray[np.int64]:
    counts = np.zeros(tuple(shape), np.int64)
    for region in regions:
        counts[region.slices()] += 1
    return counts


def assert_refused(shape: tuple[int, ...], regions: list[Region]) -> None:
    """The tiling is refused, and the box that the error names is what the error says."""
    with pytest.raises(IncompleteCoverError) as caught:
        prove_cover("w", shape, regions)
    error = caught.value.fields
    assert error["tensor"] == "w"
    named = {kind: error[kind] for kind in ("missing", "overlap", "outside") if error[kind] is not None}
    assert len(named) == 1
    ((kind, box),) = named.items()
    assert str(box) in str(caught.value)
    if kind == "outside":
        assert box in regions
        assert not Region.whole(shape).contains(box)
        return
    held = times_covered(shape, regions)[box.slices()]
    assert held.size == box.numel > 0
    assert (held == 0).all() if kind == "missing" else (held > 1).all()


@given(st.data())
def test_exact_tilings_pass(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    tiles = data.draw(tilings(shape))
    assert (times_covered(shape, tiles) == 1).all()
    prove_cover("w", shape, tiles)


@given(st.data())
def test_removing_a_tile_is_refused(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    tiles = data.draw(tilings(shape))
    tiles.remove(data.draw(st.sampled_from(tiles)))
    assert_refused(shape, tiles)


@given(st.data())
def test_duplicating_a_tile_is_refused(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    tiles = data.draw(tilings(shape))
    assert_refused(shape, [*tiles, data.draw(st.sampled_from(tiles))])


@given(st.data())
def test_shifting_a_tile_is_refused(data: st.DataObject) -> None:
    shape = data.draw(shapes.filter(len))
    tiles = data.draw(tilings(shape))
    number = data.draw(st.integers(0, len(tiles) - 1))
    offset = data.draw(st.tuples(*(st.integers(-start, 9) for start in tiles[number].start)))
    assume(any(offset))
    tiles[number] = tiles[number].shift(offset)
    assert_refused(shape, tiles)


@given(st.data())
def test_any_regions_are_judged_as_counting_does(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple))
    regions = data.draw(st.lists(boxes_in(Region.whole(shape)), max_size=6))
    if (times_covered(shape, regions) == 1).all():
        prove_cover("w", shape, regions)
    else:
        assert_refused(shape, regions)


@given(st.data())
def test_uncovered_names_a_box_that_no_region_covers(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    wanted = data.draw(boxes_in(Region.whole(shape), empty=True))
    regions = data.draw(st.lists(boxes_in(Region.whole(shape), empty=True), max_size=8))
    counts = times_covered(shape, regions)
    gap = uncovered(wanted, regions)
    if gap is None:
        assert (counts[wanted.slices()] > 0).all()
    else:
        assert wanted.contains(gap)
        assert gap.numel
        assert (counts[gap.slices()] == 0).all()


def test_pinwheel_without_its_middle_names_the_middle() -> None:
    *sides, middle = pinwheel(Region.whole((5, 5)), 0, 1)
    with pytest.raises(IncompleteCoverError) as caught:
        prove_cover("w", (5, 5), sides)
    assert caught.value.fields["missing"] == middle


def test_flat_ranges_of_many_ranks_pass() -> None:
    cuts = np.linspace(0, 7 * 11 * 13, 38).astype(int).tolist()
    boxes = [box for a, b in pairwise(cuts) for box in flat_range_boxes((7, 11, 13), a, b)]
    prove_cover("w", (7, 11, 13), boxes)


def test_empty_regions_do_not_count() -> None:
    prove_cover("w", (4,), [Region((0,), (4,)), Region((2,), (2,)), Region((9,), (9,))])
    prove_cover("w", (4, 0), [])
    prove_cover("w", (4, 0), [Region((0, 0), (4, 0))])


def test_scalar_needs_its_one_element_once() -> None:
    prove_cover("w", (), [Region((), ())])
    assert_refused((), [])
    assert_refused((), [Region((), ())] * 2)


def test_region_that_leaves_the_tensor_is_named() -> None:
    with pytest.raises(IncompleteCoverError, match=r"tensor 'w' of shape \(4,\): fragment \[0:5\] leaves") as caught:
        prove_cover("w", (4,), [Region((0,), (5,))])
    assert pickle.loads(pickle.dumps(caught.value)).fields == caught.value.fields


def test_regions_of_another_ndim_are_refused() -> None:
    with pytest.raises(LayoutError, match=r"tensor 'w' has 1 dimensions, its fragment \[0:4, 0:1\] has 2"):
        prove_cover("w", (4,), [Region((0, 0), (4, 1))])


ROWS = [Region((row, 0), (row + 1, 64)) for row in range(5000)]
GRID = [Region((x, y), (x + 1, y + 1)) for x, y in product(range(60), repeat=2)]


@pytest.mark.parametrize(("shape", "tiles"), [((5000, 64), ROWS), ((60, 60), GRID)], ids=["rows", "grid"])
def test_thousands_of_fragments_take_a_moment(shape: tuple[int, ...], tiles: list[Region]) -> None:
    best = min(_cpu_seconds(shape, tiles) for _ in range(3))
    assert best < 0.2, best
    assert_refused(shape, tiles[:2000] + tiles[2001:])
    assert_refused(shape, [*tiles, tiles[2000]])


def _cpu_seconds(shape: tuple[int, ...], tiles: list[Region]) -> float:
    start = time.process_time()
    prove_cover("w", shape, tiles)
    return time.process_time() - start
