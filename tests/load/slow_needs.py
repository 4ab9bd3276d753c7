"""What a load needs and reads, fragment by fragment: the oracle for load/needs.py, reads.py and share.py."""

from __future__ import annotations

import numpy as np

from dscheck.layout.region import Region
from dscheck.load.needs import READ_BYTES, Needs
from dscheck.load.reads import GAP_BYTES
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


def extents(needs: Needs) -> list[tuple[int, int, int]]:
    """Of each need its data file, and where in it its blocks begin and end."""
    found = []
    for need in needs:
        fragment, block_bytes = need.fragment, needs.source.block_bytes
        end = min(need.last * block_bytes, fragment.nbytes)
        found.append((fragment.writer, fragment.offset + need.first * block_bytes, fragment.offset + end))
    return found


def reads(needs: Needs) -> list[tuple[int, int, int, int]]:
    """One need after the other: the file, start and stop of each read, and how many needs it serves."""
    found: list[list[int]] = []
    for file, start, stop in sorted(extents(needs)):
        last = found[-1] if found else None
        near = last is not None and last[0] == file and start - last[2] <= GAP_BYTES
        if last is not None and near and max(last[2], stop) - last[1] <= READ_BYTES:
            last[2], last[3] = max(last[2], stop), last[3] + 1
        else:
            found.append([file, start, stop, 1])
    return [(file, start, stop, count) for file, start, stop, count in found]


def ranges(needs: Needs, piece: int, cut: int, alignment: int) -> list[list[int]]:
    """What needs take of the data files, in pieces of their fragments of `piece` bytes, joined where less than
    `alignment` lies between, and cut where a piece begins in another `cut` bytes of the file.
    """
    pieces = []
    for need, (file, start, stop) in zip(needs, extents(needs), strict=True):
        offset = need.fragment.offset
        while start < stop:
            end = min(stop, offset + ((start - offset) // piece + 1) * piece)
            pieces.append((file, start, end, (start - offset) % piece == 0))
            start = end
    found: list[list[int]] = []
    for file, start, stop, opening in sorted(pieces):
        last = found[-1] if found else None
        apart = last is None or last[0] != file or start >= last[2] + alignment
        if last is None or apart or (opening and start >= last[2] and last[1] // cut != start // cut):
            found.append([file, start, stop])
        else:
            last[2] = max(last[2], stop)
    return found
