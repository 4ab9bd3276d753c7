"""The live state: modules, optimizers, tensors and plain objects, flattened by global name and put back in place."""

from dscheck.state.boxes import PerRank, Sharded, per_rank, sharded
from dscheck.state.leaf import FlatState, Target, TensorLeaf
from dscheck.state.live import LiveState, Restore, SavedState, SavedTensor
from dscheck.state.placements import Cut, Part, Proof

__all__ = [
    "Cut",
    "FlatState",
    "LiveState",
    "Part",
    "PerRank",
    "Proof",
    "Restore",
    "SavedState",
    "SavedTensor",
    "Sharded",
    "Target",
    "TensorLeaf",
    "per_rank",
    "sharded",
]
