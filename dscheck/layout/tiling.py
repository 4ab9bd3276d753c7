"""The proof that boxes tile tensors, for many tensors at once and in columns."""

from __future__ import annotations

import numpy as np

from dscheck.layout.boxes import Bools, Int32s, Ints, opens


def tiled_in_order(tensor: Ints | Int32s, shapes: Ints, start: Ints, stop: Ints) -> Bools:
    """For each of the tensors, whether its boxes tile it in row-major order; False says nothing of other tilings.

    Row i is a box of tensor tensor[i] (ascending); start and stop have the shape [boxes, ndim], `shapes` [tensors,
    ndim]. Grids and flat ranges, and whatever cuts the first dimension, then each slab along the next one, pass: then
    each box begins where the one before it ends in one dimension, with the same bounds in those before and the whole
    turned over in those behind; the first box begins at zeros and the last one ends at the shape. By induction from
    the last dimension on that is a tiling, so that one pass over neighbours proves it.
    """
    found = np.zeros(len(shapes), np.bool_)
    found[np.flatnonzero((shapes == 0).any(axis=1))] = True
    if not len(tensor):
        return found
    first = opens(tensor)
    begins = np.flatnonzero(first)
    last = np.append(first[1:], True)
    shape = shapes[tensor]
    at_zero, at_end = start == 0, stop == shape
    follows, turned = np.zeros(len(tensor) - 1, np.bool_), np.ones(len(tensor) - 1, np.bool_)
    equal = [~first[1:]]
    for dim in range(shapes.shape[1]):
        equal.append(equal[-1] & (start[1:, dim] == start[:-1, dim]) & (stop[1:, dim] == stop[:-1, dim]))
    for dim in reversed(range(shapes.shape[1])):
        follows |= equal[dim] & (start[1:, dim] == stop[:-1, dim]) & turned
        turned &= at_end[:-1, dim] & at_zero[1:, dim]
    fine = np.where(first, at_zero.all(axis=1), np.append(True, follows))
    fine &= (start < stop).all(axis=1) & np.where(last, at_end.all(axis=1), True)
    found[tensor[begins]] = np.logical_and.reduceat(fine, begins) & (shapes[tensor[begins]] > 0).all(axis=1)
    return found
