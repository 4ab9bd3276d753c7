"""Everything dscheck raises on purpose.

    DscheckError
    ├── ConfigError(ValueError)                 a setting or argument of the call itself is wrong
    ├── StateError(TypeError)                   a value in the state that cannot be stored plainly, or not restored
    ├── LayoutError(ValueError)                 regions, shapes or placements that contradict each other
    │   └── IncompleteCoverError                fragments that do not tile a tensor exactly once
    ├── StateMismatchError(ValueError)          the checkpoint holds another model than the live state
    ├── StorageError(OSError)                   the storage failed, after whatever retries it was given
    │   ├── NoConditionError                    the store cannot create an object only where there is none
    │   └── TransientStorageError               the same call may succeed later: throttled, reset, timed out
    ├── CheckpointNotFoundError(FileNotFoundError)   no such root, step or tensor
    │   └── StepVanishedError                   the step was deleted while it was loaded
    ├── CheckpointExistsError(FileExistsError)  the root has commits and nothing was loaded from it
    ├── CorruptCheckpointError                  bytes that contradict their checksum, digest or declared sizes
    │   └── UnsupportedFormatError              written by a version that this one does not understand
    ├── SupersededError                         a newer term owns the root: this job must stop saving
    ├── TornSnapshotError                       a tensor changed before it was captured
    ├── UnusableStateError                      the live state is half loaded: load again before saving
    ├── SaveSkippedError                        the step was not saved, as the settings asked for
    ├── DeadlineError(TimeoutError)             a wait ran out; names the ranks, the phase and what was waited for
    └── RankFailureError(RuntimeError)          another rank failed; names it and carries its message

Every one of them pickles with its fields, so that a launcher may pass it between processes.
"""

from __future__ import annotations

from typing import Any


class DscheckError(Exception):
    """Base of all errors that dscheck raises on purpose. Keyword fields are attributes and survive pickling."""

    def __init__(self, message: str, **fields: Any) -> None:
        super().__init__(message)
        self.fields = fields
        self.__dict__.update(fields)

    def __str__(self) -> str:
        # OSError and its kin print errno forms; ours is the message alone.
        return str(self.args[0]) if self.args else ""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), str(self), self.fields)


def _rebuild(cls: type[DscheckError], message: str, fields: dict[str, Any]) -> DscheckError:
    return cls(message, **fields)


class ConfigError(DscheckError, ValueError):
    """A setting or an argument of the call itself is wrong."""


class StateError(DscheckError, TypeError):
    """A value of the state cannot be stored plainly, or not be put back. `path` names it."""


class LayoutError(DscheckError, ValueError):
    """Regions, shapes or placements that contradict each other."""


class IncompleteCoverError(LayoutError):
    """Fragments do not tile a tensor exactly once. `tensor` names it."""


class StateMismatchError(DscheckError, ValueError):
    """The checkpoint and the live state differ in names, shapes or dtypes."""


class StorageError(DscheckError, OSError):
    """The storage failed. `url` and `key` say where; the cause is chained."""


class NoConditionError(StorageError):
    """The store has no put-if-absent, on which every commit stands, and `commit="single-writer"` was not chosen."""


class TransientStorageError(StorageError):
    """The storage refused for now, or did not answer: the same call may succeed later."""


class CheckpointNotFoundError(DscheckError, FileNotFoundError):
    """No such root, step, tensor or object."""


class StepVanishedError(CheckpointNotFoundError):
    """The step was deleted while it was loaded. `step` and `term` name it."""


class CheckpointExistsError(DscheckError, FileExistsError):
    """The root already has committed steps, and this job has loaded none of them."""


class CorruptCheckpointError(DscheckError):
    """Bytes of the checkpoint contradict their checksum, digest or declared size. `key` says which object."""


class UnsupportedFormatError(CorruptCheckpointError):
    """Written with a format version or a required feature that this version does not know."""


class SupersededError(DscheckError):
    """A newer term owns the root. `term`, `host` and `time` are those of the newer claim."""


class TornSnapshotError(DscheckError):
    """A tensor changed between `save()` and its capture. `tensor` names it."""


class UnusableStateError(DscheckError):
    """A load failed half way: the live state is a mixture. Load a step before saving."""


class SaveSkippedError(DscheckError):
    """The step was skipped: earlier saves under way left no room for it, and `when_busy="skip"` was set."""


class DeadlineError(DscheckError, TimeoutError):
    """A wait ran out of time. `ranks`, `phase` and `waited_for` say for whom, when and what."""


class RankFailureError(DscheckError, RuntimeError):
    """Another rank failed. `ranks` lists the failed ones, `phase` says where."""
