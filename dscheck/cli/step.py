"""The step that a command is about."""

from __future__ import annotations

from dscheck.commit.contents import Contents
from dscheck.commit.history import read_history
from dscheck.errors import CheckpointNotFoundError
from dscheck.storage import Storage, open_storage


def open_step(root: str | Storage, step: int | None) -> Contents:
    """The contents of `step`, or of the newest one. Raises CheckpointNotFoundError when there is none."""
    storage = open_storage(root)
    record = read_history(storage).resolve(step)
    if record is None:
        raise CheckpointNotFoundError(f"{storage.url}: there is no committed step here")
    return Contents.open(storage, record)
