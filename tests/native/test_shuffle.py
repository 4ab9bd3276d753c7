"""Byte planes: those of NumPy's transpose, and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dscheck.native import crc32c, crc32c_parts, shuffle_blocks, unshuffle

NOISE = np.random.default_rng(11).integers(0, 256, 1 << 16, dtype=np.uint8)


@given(
    width=st.sampled_from([1, 2, 4, 8]),
    count=st.integers(0, 900),
    block=st.integers(1, 300),
    start=st.integers(0, 17),
)
def test_planes_are_those_of_a_transpose_and_come_back(width: int, count: int, block: int, start: int) -> None:
    data = NOISE[start : start + count * width]
    planes, back = np.zeros_like(data), np.zeros_like(data)
    shuffle_blocks(data.data, width, block * width, planes)
    for at in range(0, len(data), block * width):
        part = data[at : at + block * width]
        assert planes[at : at + block * width].tobytes() == part.reshape(-1, width).T.tobytes()
        unshuffle(planes[at : at + block * width].data, width, back[at : at + block * width])
    assert back.tobytes() == data.tobytes()


@pytest.mark.parametrize(
    ("width", "block", "length", "message"),
    [
        (3, 6, 12, "1, 2, 4 or 8"),
        (0, 6, 12, "1, 2, 4 or 8"),
        (4, 6, 12, "whole elements"),
        (4, 0, 12, "whole elements"),
        (4, 8, 10, "whole elements"),
    ],
)
def test_what_is_no_whole_number_of_elements_is_refused(width: int, block: int, length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shuffle_blocks(bytes(length), width, block, np.empty(length, np.uint8))


def test_an_output_of_another_length_or_in_the_same_memory_is_refused() -> None:
    data = np.zeros(64, np.uint8)
    with pytest.raises(ValueError, match="not as long"):
        unshuffle(data[:32].data, 4, np.empty(31, np.uint8))
    for begin in (0, 16, 31):
        with pytest.raises(ValueError, match="overlaps"):
            unshuffle(data[:32].data, 4, data[begin : begin + 32])
    unshuffle(data[:32].data, 4, data[32:])


def test_parts_are_checksummed_one_by_one() -> None:
    sizes = np.array([0, 1, 5, 1000, 0, 3], np.uint32)
    data, ends = NOISE[: sizes.sum()], np.cumsum(sizes)
    expected = [crc32c(data[end - size : end].data) for end, size in zip(ends, sizes, strict=True)]
    assert crc32c_parts(data.data, sizes).tolist() == expected
    for wrong in (sizes[:-1], np.append(sizes, np.uint32(1)), np.array([1 << 31, 1 << 31], np.uint32)):
        with pytest.raises(ValueError, match="all of the data"):
            crc32c_parts(data.data, wrong)
