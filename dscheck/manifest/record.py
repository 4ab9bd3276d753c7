"""Terms, records, tombstones, deletions, pins: the small sealed objects that decide which steps exist (C1, C2, C15)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from dscheck.manifest.fields import VERSION, Fields
from dscheck.manifest.keys import parse_deletion_key, parse_pin_key, parse_record_key, parse_term_key
from dscheck.manifest.text import seal, unseal

CODED = "codec"
"""What a record requires of its reader when a data file of the step is coded."""


@dataclass(frozen=True, slots=True)
class Digest:
    """One object by its size in bytes and the SHA-256 of its bytes, in lower-case hex."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Counts:
    """What a step consists of; `bytes` are those of all fragments before any codec."""

    tensors: int
    fragments: int
    ranks: int
    blocks: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Term:
    """One job's claim on a root. `parent` is the (term, step) that it continues from, None for a fresh start.

    `id` is this claim's own; `run` the id of the root's first term. `time`: seconds since 1970 by the claimant's clock.
    """

    term: int
    id: str
    run: str
    parent: tuple[int, int] | None
    host: str
    time: float

    def encode(self) -> bytes:
        """The text of `terms/<term>.json`."""
        return _encode("term", asdict(self))


@dataclass(frozen=True, slots=True)
class Record:
    """That step `step` exists, as the job of term `term` wrote it. `id` is this attempt's own: it tells a lost answer.

    `started` and `committed`: seconds since 1970, by the coordinator's clock. `versions`: what wrote it, for people.
    `metrics`: what the caller measured, by name; None for what was not finite.
    `requires`: what else than version 1 a reader must know.
    """

    step: int
    term: int
    term_id: str
    plan: Digest
    files: Digest
    counts: Counts
    versions: Mapping[str, str]
    started: float
    committed: float
    id: str
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    requires: tuple[str, ...] = ()

    def encode(self) -> bytes:
        """The text of `records/<step>-<term>.json`."""
        return _encode("record", asdict(self))


@dataclass(frozen=True, slots=True)
class Tombstone:
    """That this attempt of `step` will never exist: its record's name is taken, `by` whom and when."""

    step: int
    term: int
    by: str
    time: float

    def encode(self) -> bytes:
        """The text of `records/<step>-<term>.json`."""
        return _encode("tombstone", asdict(self))


@dataclass(frozen=True, slots=True)
class Deletion:
    """That a committed step was deleted, `by` whom and when. `id` is that of its record, which may be gone by now."""

    step: int
    term: int
    id: str
    by: str
    time: float

    def encode(self) -> bytes:
        """The text of `records/<step>-<term>.deleted.json`."""
        return _encode("deletion", asdict(self))


@dataclass(frozen=True, slots=True)
class Pin:
    """That a step is kept whatever retention says, `by` whom and since when, and why: `note` is for people."""

    step: int
    term: int
    note: str
    by: str
    time: float

    def encode(self) -> bytes:
        """The text of `pins/<step>-<term>.json`."""
        return _encode("pin", asdict(self))


def decode_term(data: bytes, key: str) -> Term:
    """The term in the object `key`. Raises CorruptCheckpointError, or UnsupportedFormatError for another version's."""
    fields = Fields(unseal(data, key), key)
    fields.envelope("term")
    term = Term(
        term=fields.count("term"),
        id=fields.text("id"),
        run=fields.text("run"),
        parent=_parent(fields),
        host=fields.text("host"),
        time=fields.number("time"),
    )
    if parse_term_key(key) != term.term:
        raise fields.corrupt("term", f"is {term.term}, the object's name says another")
    return term


def decode_record(data: bytes, key: str) -> Record | Tombstone:
    """What the object `key` holds. Raises CorruptCheckpointError, or UnsupportedFormatError for another version's."""
    fields = Fields(unseal(data, key), key)
    kind = fields.envelope("record", "tombstone", known=(CODED,))
    found: Record | Tombstone
    if kind == "tombstone":
        found = Tombstone(fields.count("step"), fields.count("term"), fields.text("by"), fields.number("time"))
    else:
        found = _record(fields)
    _compare(fields, (found.step, found.term), parse_record_key(key))
    return found


def decode_deletion(data: bytes, key: str) -> Deletion:
    """The deletion in the object `key`. Raises CorruptCheckpointError, or UnsupportedFormatError."""
    fields = Fields(unseal(data, key), key)
    fields.envelope("deletion")
    numbers = fields.count("step"), fields.count("term")
    _compare(fields, numbers, parse_deletion_key(key))
    return Deletion(*numbers, fields.text("id"), fields.text("by"), fields.number("time"))


def decode_pin(data: bytes, key: str) -> Pin:
    """The pin in the object `key`. Raises CorruptCheckpointError, or UnsupportedFormatError."""
    fields = Fields(unseal(data, key), key)
    fields.envelope("pin")
    numbers = fields.count("step"), fields.count("term")
    _compare(fields, numbers, parse_pin_key(key))
    return Pin(*numbers, fields.text("note"), fields.text("by"), fields.number("time"))


def _compare(fields: Fields, found: tuple[int, int], named: tuple[int, int] | None) -> None:
    if found != named:
        raise fields.corrupt("step", f"is {found[0]} of term {found[1]}, the object's name says another")


def _record(fields: Fields) -> Record:
    counts = fields.fields("counts")
    return Record(
        step=fields.count("step"),
        term=fields.count("term"),
        term_id=fields.text("term_id"),
        plan=_digest(fields.fields("plan")),
        files=_digest(fields.fields("files")),
        counts=Counts(**{name: counts.count(name) for name in Counts.__dataclass_fields__}),
        versions=fields.texts("versions"),
        started=fields.number("started"),
        committed=fields.number("committed"),
        id=fields.text("id"),
        metrics=fields.numbers("metrics"),
        requires=tuple(fields.items("requires")),
    )


def _digest(fields: Fields) -> Digest:
    return Digest(fields.count("size"), fields.sha256("sha256"))


def _parent(fields: Fields) -> tuple[int, int] | None:
    if fields.get("parent") is None:
        return None
    parent = fields.fields("parent")
    term, step = parent.count("term"), parent.count("step")
    if term >= fields.count("term"):
        raise fields.corrupt("parent", f"is term {term}, one below {fields.count('term')} expected")
    return term, step


def _encode(kind: str, body: dict[str, Any]) -> bytes:
    if kind == "term" and body["parent"] is not None:
        body["parent"] = dict(zip(("term", "step"), body["parent"], strict=True))
    return seal({"version": VERSION, "requires": list(body.pop("requires", ())), "kind": kind, **body})
