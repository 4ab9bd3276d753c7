"""Boxes of placements against NumPy, which cuts an array of indices as torch.chunk would, in the order it was told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dscheck.errors import LayoutError
from dscheck.layout import Placement, Region, Replicate, Shard, StridedShard, local_pieces, local_shape, prove_cover

Array = npt.NDArray[np.int64]


def chunk(array: Array, dim: int, parts: int, index: int) -> Array:
    size = -(-array.shape[dim] // parts)
    return array.take(range(index * size, min((index + 1) * size, array.shape[dim])), axis=dim)


def strided_chunk(array: Array, dim: int, split_factor: int, parts: int, index: int) -> Array:
    pieces = [chunk(chunk(array, dim, split_factor, part), dim, parts, index) for part in range(split_factor)]
    return np.concatenate(pieces, axis=dim)


def indices(shape: Sequence[int]) -> Array:
    return np.arange(math.prod(shape)).reshape(tuple(shape))


def by_pieces(
    shape: Sequence[int], mesh: Sequence[int], placements: Sequence[Placement], coordinate: Sequence[int]
) -> Array:
    local = np.full(local_shape(shape, mesh, placements, coordinate), -1)
    before = (-1,) * len(shape)
    for there, here in local_pieces(shape, mesh, placements, coordinate):
        assert here.start > before or not shape
        before = here.start
        local[here.slices()] = indices(shape)[there.slices()]
    assert -1 not in local
    return local


shapes = st.lists(st.integers(0, 13), min_size=1, max_size=3)
meshes = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@given(st.data())
def test_plain_shards_cut_from_left_to_right(data: st.DataObject) -> None:
    shape, mesh = data.draw(shapes), data.draw(meshes)
    dims = data.draw(st.tuples(*(st.sampled_from([None, *range(len(shape))]) for _ in mesh)))
    placements = [Replicate() if dim is None else Shard(dim) for dim in dims]
    for coordinate in product(*map(range, mesh)):
        expected = indices(shape)
        for dim, parts, index in zip(dims, mesh, coordinate, strict=True):
            expected = expected if dim is None else chunk(expected, dim, parts, index)
        assert np.array_equal(by_pieces(shape, mesh, placements, coordinate), expected)


@given(st.data())
def test_split_factors_tell_the_order_of_the_cuts(data: st.DataObject) -> None:
    """torch's rule: the factor counts the parts made earlier by mesh dimensions further right."""
    size, mesh = data.draw(st.integers(0, 60)), data.draw(meshes)
    order = data.draw(st.permutations(range(len(mesh))))
    placements: list[Placement] = []
    for dim in range(len(mesh)):
        factor = math.prod(mesh[other] for other in order[: order.index(dim)] if other > dim)
        placements.append(StridedShard(0, factor) if factor > 1 else Shard(0))
    held = []
    for coordinate in product(*map(range, mesh)):
        expected = indices((size,))
        for dim in order:
            expected = chunk(expected, 0, mesh[dim], coordinate[dim])
        assert np.array_equal(by_pieces((size,), mesh, placements, coordinate), expected)
        held += [there for there, _ in local_pieces((size,), mesh, placements, coordinate)]
    prove_cover("w", (size,), held)


@given(st.data())
def test_strided_shard_without_shards_to_its_right_is_several_boxes(data: st.DataObject) -> None:
    shape, parts = data.draw(shapes), data.draw(st.integers(1, 4))
    dim, factor = data.draw(st.integers(0, len(shape) - 1)), data.draw(st.integers(1, 5))
    held = []
    for index in range(parts):
        expected = strided_chunk(indices(shape), dim, factor, parts, index)
        assert np.array_equal(by_pieces(shape, (parts,), (StridedShard(dim, factor),), (index,)), expected)
        pieces = local_pieces(shape, (parts,), (StridedShard(dim, factor),), (index,))
        assert len(pieces) <= factor
        prove_cover("local", expected.shape, [here for _, here in pieces])
        held += [there for there, _ in pieces]
    prove_cover("w", shape, held)


@given(st.data())
def test_factors_that_tell_no_order_are_applied_as_they_stand(data: st.DataObject) -> None:
    size, mesh = data.draw(st.integers(0, 60)), (data.draw(st.integers(2, 4)), data.draw(st.integers(2, 4)))
    factor = data.draw(st.integers(2, 9).filter(lambda factor: factor != mesh[1]))
    for coordinate in product(*map(range, mesh)):
        expected = strided_chunk(indices((size,)), 0, factor, mesh[0], coordinate[0])
        expected = chunk(expected, 0, mesh[1], coordinate[1])
        assert np.array_equal(by_pieces((size,), mesh, (StridedShard(0, factor), Shard(0)), coordinate), expected)


def test_pieces_along_two_dimensions_are_every_pair() -> None:
    pieces = local_pieces((4, 8), (2, 2), (StridedShard(0, 2), StridedShard(1, 2)), (1, 0))
    assert [(str(there), str(here)) for there, here in pieces] == [
        ("[1:2, 0:2]", "[0:1, 0:2]"),
        ("[1:2, 4:6]", "[0:1, 2:4]"),
        ("[3:4, 0:2]", "[1:2, 0:2]"),
        ("[3:4, 4:6]", "[1:2, 2:4]"),
    ]


def test_pieces_that_touch_are_one_box() -> None:
    assert local_pieces((9,), (1,), (StridedShard(0, 3),), (0,)) == ((Region((0,), (9,)), Region((0,), (9,))),)


def test_scalar_is_whole_on_every_rank() -> None:
    assert local_pieces((), (2, 3), (Replicate(), Replicate()), (1, 2)) == ((Region((), ()), Region((), ())),)


def test_rank_outside_the_mesh_and_empty_shard_have_no_pieces() -> None:
    assert local_pieces((8,), (4,), (Shard(0),), None) == ()
    assert local_pieces((3, 5), (4,), (Shard(0),), (3,)) == ()
    assert local_shape((3, 5), (4,), (Shard(0),), (3,)) == (0, 5)


@pytest.mark.parametrize(
    ("mesh", "placements", "coordinate", "message"),
    [
        ((2, 2), (Shard(0),), (0, 0), "needs as many placements"),
        ((2,), (Shard(0),), (0, 0), "needs as many placements"),
        ((2,), (Shard(0),), (2,), "outside the mesh"),
        ((2,), (Shard(0),), (-1,), "outside the mesh"),
        ((2,), (Shard(2),), (0,), "does not fit a tensor of shape"),
        ((2,), (Shard(-1),), (0,), "does not fit a tensor of shape"),
        ((2,), (StridedShard(0, 0),), (0,), "does not fit a tensor of shape"),
    ],
    ids=str,
)
def test_arguments_that_contradict_each_other_are_refused(
    mesh: tuple[int, ...], placements: tuple[Placement, ...], coordinate: tuple[int, ...], message: str
) -> None:
    with pytest.raises(LayoutError, match=message):
        local_pieces((8, 8), mesh, placements, coordinate)
