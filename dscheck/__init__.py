"""Asynchronous distributed checkpointing for PyTorch.

Importing this package costs no torch, no pyarrow and no numpy: the names that need them load on first use (PEP 562).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dscheck.config import Keep
from dscheck.errors import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    DeadlineError,
    DscheckError,
    IncompleteCoverError,
    LayoutError,
    NoConditionError,
    RankFailureError,
    SaveSkippedError,
    StateError,
    StateMismatchError,
    StepVanishedError,
    StorageError,
    SupersededError,
    TornSnapshotError,
    TransientStorageError,
    UnsupportedFormatError,
    UnusableStateError,
)

if TYPE_CHECKING:
    from dscheck.checkpointer import Checkpointer, LoadReport, SaveHandle
    from dscheck.state import PerRank, Sharded, per_rank, sharded
    from dscheck.storage.tier import Tier

__version__ = "0.1.0"

__all__ = [
    "CheckpointExistsError",
    "CheckpointNotFoundError",
    "Checkpointer",
    "ConfigError",
    "CorruptCheckpointError",
    "DeadlineError",
    "DscheckError",
    "IncompleteCoverError",
    "Keep",
    "LayoutError",
    "LoadReport",
    "NoConditionError",
    "PerRank",
    "RankFailureError",
    "SaveHandle",
    "SaveSkippedError",
    "Sharded",
    "StateError",
    "StateMismatchError",
    "StepVanishedError",
    "StorageError",
    "SupersededError",
    "Tier",
    "TornSnapshotError",
    "TransientStorageError",
    "UnsupportedFormatError",
    "UnusableStateError",
    "__version__",
    "per_rank",
    "sharded",
]

_LAZY = {
    "Checkpointer": "dscheck.checkpointer",
    "LoadReport": "dscheck.checkpointer",
    "SaveHandle": "dscheck.checkpointer",
    "PerRank": "dscheck.state",
    "Sharded": "dscheck.state",
    "per_rank": "dscheck.state",
    "sharded": "dscheck.state",
    "Tier": "dscheck.storage.tier",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
