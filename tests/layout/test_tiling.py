"""The proof over columns against the one over regions, and boxes as columns against regions."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dscheck.errors import IncompleteCoverError
from dscheck.layout import Region, flat_range_boxes, prove_cover
from dscheck.layout.boxes import Boxes, chunks, opens, padded
from dscheck.layout.tiling import tiled_in_order
from tests.layout.boxes import boxes_in, shapes, tilings

Cut = tuple[tuple[int, ...], list[Region]]


def tiles(shape: tuple[int, ...], regions: list[Region]) -> bool:
    try:
        prove_cover("w", shape, regions)
    except IncompleteCoverError:
        return False
    return True


def proved(cuts: list[Cut]) -> list[bool]:
    ndim = max((len(shape) for shape, _ in cuts), default=0)
    rows = [(i, region) for i, (_, regions) in enumerate(cuts) for region in sorted(regions)]
    start, stop = Boxes.of([region for _, region in rows]).matrices(ndim)
    tensor = np.array([i for i, _ in rows], np.int64)
    found: list[bool] = tiled_in_order(tensor, padded([shape for shape, _ in cuts], ndim), start, stop).tolist()
    return found


@st.composite
def grids(draw: st.DrawFn) -> Cut:
    """A grid of uneven cuts, as meshes make them."""
    shape = draw(shapes)
    lines = [list(pairwise(sorted({0, n, *draw(st.sets(st.integers(0, n), max_size=3))}))) for n in shape]
    boxes = [Region(tuple(a for a, _ in cell), tuple(b for _, b in cell)) for cell in product(*lines)]
    return shape, [box for box in boxes if box.numel]


@st.composite
def flat_ranges(draw: st.DrawFn) -> Cut:
    shape = draw(shapes)
    size = Region.whole(shape).numel
    cuts = sorted({0, size, *draw(st.sets(st.integers(0, size), max_size=5))})
    return shape, [box for a, b in pairwise(cuts) for box in flat_range_boxes(shape, a, b)]


@given(st.lists(grids() | flat_ranges(), max_size=5))
def test_grids_and_flat_ranges_are_proved_in_one_pass(cuts: list[Cut]) -> None:
    assert proved(cuts) == [True] * len(cuts)


@st.composite
def wrong(draw: st.DrawFn) -> Cut:
    shape, regions = draw(grids() | flat_ranges() | shapes.flatmap(lambda s: st.tuples(st.just(s), tilings(s))))
    regions, bounds = list(regions), Region.whole(tuple(n + 2 for n in shape))
    how = draw(st.sampled_from(["none", "less", "twice", "other", "more"]))
    if how == "more":
        regions.append(draw(boxes_in(bounds)))
    elif how != "none" and regions:
        at = draw(st.integers(0, len(regions) - 1))
        regions[at : at + 1] = {"less": [], "twice": [regions[at]] * 2, "other": [draw(boxes_in(bounds))]}[how]
    return shape, regions


@given(st.lists(wrong(), max_size=4))
def test_nothing_is_proved_that_does_not_tile(cuts: list[Cut]) -> None:
    for found, (shape, regions) in zip(proved(cuts), cuts, strict=True):
        assert not found or tiles(shape, regions)


@given(st.lists(shapes.flatmap(lambda shape: boxes_in(Region.whole(shape), empty=True)), max_size=12), st.data())
def test_boxes_are_regions_in_columns(regions: list[Region], data: st.DataObject) -> None:
    boxes = Boxes.of(regions)
    assert [boxes.region(row) for row in range(len(boxes))] == regions
    begin = data.draw(st.integers(0, len(regions)))
    end = data.draw(st.integers(begin, len(regions)))
    part = boxes.part(begin, end)
    assert [part.region(row) for row in range(len(part))] == regions[begin:end]
    rows = data.draw(st.lists(st.integers(0, len(regions) - 1), max_size=5)) if regions else []
    taken = boxes.take(np.array(rows, np.int64))
    assert [taken.region(row) for row in range(len(taken))] == [regions[row] for row in rows]
    joined = Boxes.joined([part, taken])
    assert [joined.region(row) for row in range(len(joined))] == regions[begin:end] + [regions[row] for row in rows]
    start, stop = boxes.matrices(5)
    assert start.shape == stop.shape == (len(regions), 5)
    again = Boxes.cut(start, stop, boxes.ndim)
    assert [again.region(row) for row in range(len(again))] == regions
    assert all((start[row, region.ndim :] == 0).all() for row, region in enumerate(regions))
    assert all((stop[row, region.ndim :] == 1).all() for row, region in enumerate(regions))


@given(st.lists(st.integers(0, 3), max_size=40))
def test_chunks_are_cut_where_a_tensor_begins(tensors: list[int]) -> None:
    tensor = np.array(sorted(tensors), np.int64)
    opening = opens(tensor)
    found = list(chunks(np.arange(len(tensor) + 1) * (1 << 20), opening))
    assert [edge for edge, _ in found] == [0, *(end for _, end in found[:-1])][: len(found)]
    assert sum(end - begin for begin, end in found) == len(tensor)
    for begin, end in found:
        assert opening[begin]
        assert end - begin <= 4 or opening[begin:end].sum() == 1
