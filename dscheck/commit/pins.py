"""Pins: steps that retention, `gc` and `rm` leave alone, each by a small object beside the records."""

from __future__ import annotations

from dscheck.commit.listing import StepRef, unknown
from dscheck.commit.once import put_once
from dscheck.manifest.keys import parse_pin_key, pin_key
from dscheck.manifest.record import Pin, Record, decode_pin
from dscheck.storage.base import Storage


def pinned(storage: Storage) -> frozenset[StepRef]:
    """All pinned steps, by the names in pins/ alone. Raises CorruptCheckpointError for a name that is not ours."""
    found = set()
    for entry in storage.list("pins/"):
        numbers = parse_pin_key(entry.key)
        if numbers is None:
            raise unknown(storage, entry.key)
        found.add(StepRef(*numbers))
    return frozenset(found)


def read_pin(storage: Storage, ref: StepRef) -> Pin:
    """The pin of a step that has one."""
    key = pin_key(ref.step, ref.term)
    return decode_pin(storage.read(key), key)


def pin(storage: Storage, record: Record, *, note: str, by: str, now: float) -> Pin:
    """The pin of the step, which may be an older one: then that one's note stands."""
    key = pin_key(record.step, record.term)
    return decode_pin(put_once(storage, key, Pin(record.step, record.term, note, by, now).encode()), key)


def unpin(storage: Storage, ref: StepRef) -> None:
    """The step has no pin any more."""
    storage.delete(pin_key(ref.step, ref.term))
