"""`dscheck pin`: a step is kept whatever retention says, until its pin is removed."""

from __future__ import annotations

import socket
import time

from dscheck.cli.named import named_step
from dscheck.commit.history import read_history
from dscheck.commit.listing import StepRef, read_deletion
from dscheck.commit.pins import pin, pinned, unpin
from dscheck.errors import CheckpointNotFoundError, ConfigError
from dscheck.storage import Storage, open_storage

LONGEST_NOTE = 1000
"""Characters: a pin is one small read."""


def show(root: str | Storage, name: str, remove: bool, note: str) -> None:
    """Pin the step, or remove its pin. Raises ConfigError, and CheckpointNotFoundError for a step without."""
    if len(note) > LONGEST_NOTE:
        raise ConfigError(f"--note has {len(note)} characters, at most {LONGEST_NOTE} expected")
    storage = open_storage(root)
    record = named_step(read_history(storage), name)
    ref = StepRef(record.step, record.term)
    there = ref in pinned(storage)
    if remove:
        if not there:
            raise CheckpointNotFoundError(f"{storage.url}: step {ref.step} of term {ref.term} is not pinned")
        unpin(storage, ref)
        print(f"step {ref.step} of term {ref.term} is not pinned any more")
        return
    if there:
        raise ConfigError(
            f"{storage.url}: step {ref.step} of term {ref.term} is pinned already: --remove that pin first"
        )
    pin(storage, record, note=note, by=socket.gethostname(), now=time.time())
    # Whoever looked for pins before this one may have deleted the step meanwhile.
    if read_deletion(storage, ref) is not None:
        unpin(storage, ref)
        raise CheckpointNotFoundError(f"{storage.url}: step {ref.step} of term {ref.term} was deleted meanwhile")
    print(f"step {ref.step} of term {ref.term} is pinned")
