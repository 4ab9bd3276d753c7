"""The live state: modules, optimizers, tensors and plain objects, flattened by global name and put back in place."""

from dscheck.state.boxes import PerRank, Sharded, per_rank, sharded
from dscheck.state.leaf import FlatState, Part, Proof, TensorLeaf
from dscheck.state.live import LiveState, Restore, SavedState, SavedTensor

__all__ = [
    "FlatState",
    "LiveState",
    "Part",
    "PerRank",
    "Proof",
    "Restore",
    "SavedState",
    "SavedTensor",
    "Sharded",
    "TensorLeaf",
    "per_rank",
    "sharded",
]
