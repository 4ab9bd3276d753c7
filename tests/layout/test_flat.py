"""Flat ranges against NumPy: every range of every small shape."""

from __future__ import annotations

import math
import pickle
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dscheck.errors import LayoutError
from dscheck.layout import Region, flat_range_boxes

SMALL = [shape for ndim in range(5) for shape in product(range(4 if ndim < 4 else 3), repeat=ndim)]


@pytest.mark.parametrize("ndim", range(5))
def test_boxes_of_every_range_are_the_range_in_order(ndim: int) -> None:
    for shape in (shape for shape in SMALL if len(shape) == ndim):
        flat = np.arange(math.prod(shape)).reshape(shape)
        for start in range(flat.size + 1):
            for stop in range(start, flat.size + 1):
                boxes = flat_range_boxes(shape, start, stop)
                held = [element for box in boxes for element in flat[box.slices()].ravel()]
                assert held == list(range(start, stop)), (shape, start, stop)
                assert len(boxes) <= max(2 * ndim - 1, 1), (shape, start, stop)
                assert all(box.numel for box in boxes), (shape, start, stop)


def test_bound_on_the_number_of_boxes_is_reached() -> None:
    assert len(flat_range_boxes((3, 3, 3, 3), 1, 80)) == 2 * 4 - 1


@given(st.data())
def test_boxes_of_large_shapes_start_where_the_last_one_stopped(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 1 << 20), min_size=1, max_size=5))
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    at = start
    for box in flat_range_boxes(shape, start, stop):
        assert sum(i * stride for i, stride in zip(box.start, strides, strict=True)) == at
        at += box.numel
        assert sum((i - 1) * stride for i, stride in zip(box.stop, strides, strict=True)) == at - 1
    assert at == stop


def test_whole_rows_are_one_box() -> None:
    assert flat_range_boxes((4, 5, 6), 30, 90) == (Region((1, 0, 0), (3, 5, 6)),)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 7), (7, 7)])
def test_range_outside_the_tensor_is_refused(start: int, stop: int) -> None:
    with pytest.raises(LayoutError, match=r"does not lie in the 6 elements of shape \(2, 3\)") as caught:
        flat_range_boxes((2, 3), start, stop)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
