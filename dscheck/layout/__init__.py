"""The algebra of boxes: how a global tensor is cut, who writes which piece, and the proof that the pieces tile it.

Integers only and no torch; what goes over whole plans (`boxes`, `tiling`) does so in columns of NumPy.
"""

from dscheck.layout.cover import prove_cover, uncovered
from dscheck.layout.flat import flat_range_boxes
from dscheck.layout.placement import Placement, Replicate, Shard, StridedShard, local_pieces, local_shape
from dscheck.layout.region import Region
from dscheck.layout.runs import byte_runs
from dscheck.layout.shares import writer_shares

__all__ = [
    "Placement",
    "Region",
    "Replicate",
    "Shard",
    "StridedShard",
    "byte_runs",
    "flat_range_boxes",
    "local_pieces",
    "local_shape",
    "prove_cover",
    "uncovered",
    "writer_shares",
]
