"""What a load needs, fragment by fragment: the oracle for load/needs.py."""

from __future__ import annotations

import numpy as np

from dscheck.layout.region import Region
from dscheck.manifest.dtypes import ITEMSIZE
from dscheck.manifest.plan import Plan


def bytes_of(outer: Region, box: Region, itemsize: int) -> np.ndarray:
    """The offsets of all bytes of `box` in the row-major bytes of `outer`, ascending."""
    whole = np.arange(outer.numel * itemsize).reshape(*outer.shape, itemsize)
    return whole[box.relative_to(outer.start).slices()].reshape(-1)


def needs(plan: Plan, tensor: int, wanted: Region) -> list[tuple[int, Region, set[int]]]:
    """Of each fragment that overlaps: its writer, the box, and the blocks that hold a byte of the box."""
    itemsize, found = ITEMSIZE[plan.tensors[tensor].dtype], []
    for fragment in plan.fragments_of(tensor):
        box = fragment.region.intersect(wanted)
        if box is not None and box.numel:
            places = bytes_of(fragment.region, box, itemsize)
            found.append((fragment.writer, box, set((places // plan.block_bytes).tolist())))
    return found
