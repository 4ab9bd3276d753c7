"""Verified bytes reach strided boxes of live memory: byte for byte as a loop over elements would bring them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dscheck.native import crc32c_blocks, place

GUARD = 32
"""Bytes round the target that nothing may touch."""

Axes = list[tuple[int, int, int]]


def slow_twin(data: bytes, source: int, target: bytearray, at: int, itemsize: int, axes: Axes) -> None:
    for index in itertools.product(*(range(count) for count, _, _ in axes)):
        far = source + sum(i * step for i, (_, step, _) in zip(index, axes, strict=True))
        near = at + sum(i * step for i, (_, _, step) in zip(index, axes, strict=True))
        target[near : near + itemsize] = data[far : far + itemsize]


@st.composite
def boxes(draw: st.DrawFn) -> tuple[int, int, Axes, int, int]:
    """Source offset, item size, axes, and the bytes that source and target take. Each side has gaps of its own, the
    target's dimensions lie in any order."""
    itemsize = draw(st.sampled_from([1, 2, 4, 8, 16]))
    shape = draw(st.lists(st.integers(1, 4), max_size=4))
    if shape and draw(st.booleans()):
        shape[-1] = draw(st.sampled_from([1, 3, 7, 16, 33, 40, 64, 129, 300, 600]))
    source, far = [0] * len(shape), itemsize
    for dim in reversed(range(len(shape))):
        source[dim] = far
        far *= shape[dim] + draw(st.integers(0, 2))
    target, near = [0] * len(shape), itemsize
    order = draw(st.permutations(range(len(shape)))) if draw(st.booleans()) else list(range(len(shape)))
    for dim in reversed(order):
        target[dim] = near
        near *= shape[dim] + draw(st.integers(0, 2))
    offset = draw(st.integers(0, 3)) * itemsize
    return offset, itemsize, list(zip(shape, source, target, strict=True)), offset + far, near


@given(boxes(), st.randoms(use_true_random=False))
def test_a_scatter_equals_its_slow_twin(case: tuple[int, int, Axes, int, int], random: np.random.Generator) -> None:
    source, itemsize, axes, far, near = case
    data = random.randbytes(far)  # type: ignore[attr-defined]
    expected = bytearray(near + 2 * GUARD)
    slow_twin(data, source, expected, GUARD, itemsize, axes)
    target = np.zeros(near + 2 * GUARD, np.uint8)
    copy = (source, target.ctypes.data + GUARD, itemsize, axes)
    assert place(np.frombuffer(data, np.uint8), 4096, [], [copy]) is None
    assert target.tobytes() == bytes(expected)


@pytest.mark.parametrize("row", [64, 128, 4096])
@pytest.mark.parametrize("shift", [0, 1, 16])
def test_a_large_box_past_the_caches_equals_numpy(row: int, shift: int) -> None:
    rows = (2 << 20) // row
    data = np.random.default_rng(row).integers(0, 256, (rows, 2 * row), dtype=np.uint8)
    around = np.zeros(rows * 3 * row + 128, np.uint8)
    start = -around.ctypes.data % 64 + shift
    target = around[start : start + rows * 3 * row].reshape(rows, 3 * row)
    axes = [(rows, 2 * row, 3 * row), (row, 1, 1)]
    assert place(data.reshape(-1), 4096, [], [(row, target.ctypes.data + row, 1, axes)]) is None
    expected = np.zeros_like(target)
    expected[:, row : 2 * row] = data[:, row:]
    assert (target == expected).all()
    assert around.sum(dtype=np.int64) == expected.sum(dtype=np.int64)


@pytest.mark.parametrize("axes", [[(0, 1, 1)], [(3, 8, 8), (0, 1, 1)], [(0, 8, 8), (4, 1, 1)]])
def test_an_empty_box_reads_and_writes_nothing(axes: Axes) -> None:
    assert place(np.zeros(0, np.uint8), 4096, [], [(0, 0, 1, axes)]) is None


def test_nothing_is_placed_of_a_read_with_a_damaged_block() -> None:
    data = np.arange(200, dtype=np.uint8)
    crcs = crc32c_blocks(data, 64)
    target = np.zeros(200, np.uint8)
    copy = (0, target.ctypes.data, 1, [(200, 1, 1)])
    blocks = [(0, 128, crcs[:2]), (128, 72, crcs[2:])]
    assert place(data, 64, blocks, [copy]) is None
    assert (target == data).all()
    data[130] ^= 1
    target[:] = 0
    offset, stored, found = place(data, 64, blocks, [copy])  # type: ignore[misc]
    assert (offset, stored) == (128, crcs[2])
    assert found == crc32c_blocks(data, 64)[2]
    assert not target.any()


@pytest.mark.parametrize(
    ("blocks", "copies"),
    [
        ([(0, 101, [0, 0])], []),
        ([(90, 20, [0])], []),
        ([(0, 65, [0])], []),
        ([], [(0, 0, 1, [(101, 1, 1)])]),
        ([], [(97, 0, 4, [])]),
        ([], [(0, 0, 4, [(2, 97, 4)])]),
    ],
)
def test_what_lies_outside_of_the_bytes_is_refused(
    blocks: list[tuple[int, int, list[int]]], copies: list[object]
) -> None:
    given = [(offset, nbytes, np.array(crcs, np.uint32)) for offset, nbytes, crcs in blocks]
    with pytest.raises(ValueError, match="do not lie in the bytes"):
        place(np.zeros(100, np.uint8), 64, given, copies)  # type: ignore[arg-type]
