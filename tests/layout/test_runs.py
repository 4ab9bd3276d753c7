"""Byte runs against NumPy: the bytes they name are the bytes of the box."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dscheck.errors import LayoutError
from dscheck.layout import Region, byte_runs
from tests.layout.boxes import boxes_in, shapes


@given(st.data())
def test_runs_are_the_bytes_of_the_box_and_maximal(data: st.DataObject) -> None:
    outer = data.draw(boxes_in(Region.whole(data.draw(shapes))))
    inner = data.draw(boxes_in(outer, empty=True))
    itemsize = data.draw(st.sampled_from([1, 2, 4, 8, 16]))
    offsets = np.arange(outer.numel * itemsize).reshape(*outer.shape, itemsize)
    expected = offsets[inner.relative_to(outer.start).slices()].ravel()
    runs = list(byte_runs(outer, inner, itemsize))
    assert [at for offset, length in runs for at in range(offset, offset + length)] == expected.tolist()
    assert len(runs) == len(np.flatnonzero(np.diff(expected, prepend=-2) != 1))


def test_whole_box_is_one_run() -> None:
    assert list(byte_runs(Region((3, 1), (5, 9)), Region((3, 1), (5, 9)), 2)) == [(0, 32)]
    assert list(byte_runs(Region((), ()), Region((), ()), 8)) == [(0, 8)]


def test_whole_rows_are_one_run() -> None:
    assert list(byte_runs(Region.whole((6, 4, 5)), Region((2, 0, 0), (5, 4, 5)), 4)) == [(160, 240)]


@pytest.mark.parametrize("inner", [Region((0,), (5,)), Region((7,), (8,)), Region((2, 0), (3, 1))], ids=str)
def test_box_outside_is_refused_at_the_call(inner: Region) -> None:
    with pytest.raises(LayoutError, match="does not lie in box"):
        byte_runs(Region((2,), (6,)), inner, 1)
