"""A step by the name that a person gives it: its number, or its number and term."""

from __future__ import annotations

from dscheck.commit.history import History
from dscheck.commit.listing import StepRef
from dscheck.errors import CheckpointNotFoundError, ConfigError
from dscheck.manifest.keys import parse_record_key
from dscheck.manifest.record import Record


def named_step(history: History, name: str) -> Record:
    """The record of a step of the live history ("300"), or of any one with its term ("300-2").

    Raises ConfigError for another text, CheckpointNotFoundError when there is no such step.
    """
    numbers = parse_record_key(f"records/{name if '-' in name else f'{name}-1'}.json")
    if numbers is None:
        raise ConfigError(f"{name!r} is no step: write 300, or 300-2 for step 300 of term 2")
    if "-" in name:
        ref = StepRef(*numbers)
        if ref not in history.names:
            raise CheckpointNotFoundError(
                f"{history.storage.url}: there is no step {ref.step} of term {ref.term}"
                f"{', it was deleted' if ref in history.deleted else ''}: `dscheck ls` shows what there is"
            )
        return history.record(ref)
    record = history.resolve(numbers[0])
    assert record is not None, "only the newest may not be there"
    return record
