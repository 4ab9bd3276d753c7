"""Which steps exist, and which of them belong to the live history: the records on the newest term's ancestry (C2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

from dscheck.commit.once import read_if_there
from dscheck.commit.term import read_term
from dscheck.errors import CheckpointNotFoundError, CorruptCheckpointError
from dscheck.manifest.keys import parse_record_key, parse_term_key, record_key
from dscheck.manifest.record import Record, Term, Tombstone, decode_record
from dscheck.storage.base import Storage

T = TypeVar("T")


@dataclass(frozen=True, slots=True, order=True)
class StepRef:
    """A step as one term committed it."""

    step: int
    term: int


@dataclass(frozen=True)
class History:
    """What a root held when it was listed. `names` are the records' names, of which some may turn out to be
    tombstones.
    """

    storage: Storage
    names: frozenset[StepRef]
    terms: frozenset[int]
    _claims: dict[int, Term] = field(default_factory=dict)

    @property
    def newest_term(self) -> int:
        """The highest term that was claimed, 0 for none."""
        return max(self.terms, default=0)

    @cached_property
    def run(self) -> str | None:
        """The id of the root's first term: the identity of the run; None before there is any."""
        return self.claim(min(self.terms)).run if self.terms else None

    @cached_property
    def visible(self) -> tuple[StepRef, ...]:
        """The steps of the live history, ascending; tombstones are not among them.

        A term that continues from nothing hides nothing before its first commit: a fresh start moves from old to new
        at one point, and not by way of neither.
        """
        for head in sorted(self.terms, reverse=True):
            found = tuple(sorted(ref for ref in self._on_ancestry(head) if self._exists(ref)))
            if found or self.claim(head).parent is not None:
                return found
        return ()

    @property
    def newest(self) -> StepRef | None:
        """The newest step of the live history."""
        return self.visible[-1] if self.visible else None

    @property
    def abandoned(self) -> tuple[StepRef, ...]:
        """Committed steps of branches that no newer term continued, ascending."""
        live = set(self.visible)
        return tuple(sorted(ref for ref in self.names if ref not in live and self._exists(ref)))

    def claim(self, number: int) -> Term:
        """The claim of one term, read once."""
        if number not in self._claims:
            self._claims[number] = read_term(self.storage, number)
        return self._claims[number]

    def record(self, ref: StepRef) -> Record:
        """The record of one step. Raises CheckpointNotFoundError when it is gone, or a tombstone."""
        key = record_key(ref.step, ref.term)
        stored = read_if_there(self.storage, key)
        found = None if stored is None else decode_record(stored, key)
        if not isinstance(found, Record):
            raise CheckpointNotFoundError(f"{self.storage.url}/{key}: this step was removed meanwhile", key=key)
        return found

    def resolve(self, step: int | None) -> Record | None:
        """The record of `step`, or of the newest one; None when the newest is asked for and there is none.

        Raises CheckpointNotFoundError: for an abandoned step it says which term holds it, else which steps there are.
        """
        if step is None:
            return None if self.newest is None else self.record(self.newest)
        ref = next((ref for ref in self.visible if ref.step == step), None)
        if ref is not None:
            return self.record(ref)
        holder = next((ref.term for ref in reversed(self.abandoned) if ref.step == step), None)
        if holder is not None:
            raise CheckpointNotFoundError(
                f"{self.storage.url}: step {step} was committed by term {holder}, on a branch that was abandoned when "
                f"a later "
                f"term continued from an earlier step; the live history has {_listed(self.visible)}",
                step=step,
                term=holder,
            )
        raise CheckpointNotFoundError(
            f"{self.storage.url}: there is no step {step}; committed are {_listed(self.visible)}", step=step
        )

    def _on_ancestry(self, head: int) -> Iterable[StepRef]:
        limit: int | None = None
        number: int | None = head
        by_term: Mapping[int, list[StepRef]] = self._by_term
        while number is not None:
            for ref in by_term.get(number, ()):
                if limit is None or ref.step <= limit:
                    yield ref
            parent = self.claim(number).parent
            if parent is not None and parent[0] >= number:
                raise CorruptCheckpointError(f"{self.storage.url}: term {number} continues from term {parent[0]}")
            number, limit = (None, None) if parent is None else (parent[0], _lower(limit, parent[1]))

    @cached_property
    def _by_term(self) -> Mapping[int, list[StepRef]]:
        found: dict[int, list[StepRef]] = {}
        for ref in self.names:
            found.setdefault(ref.term, []).append(ref)
        return found

    def _exists(self, ref: StepRef) -> bool:
        """Whether the name is a record and not a tombstone. Only terms older than the newest can have tombstones."""
        if ref.term == self.newest_term:
            return True
        key = record_key(ref.step, ref.term)
        stored = read_if_there(self.storage, key)
        return stored is not None and not isinstance(decode_record(stored, key), Tombstone)


def _lower(limit: int | None, step: int) -> int:
    return step if limit is None else min(limit, step)


def _listed(refs: tuple[StepRef, ...]) -> str:
    steps = [str(ref.step) for ref in refs]
    if len(steps) > 8:
        steps = [*steps[:3], "...", *steps[-4:]]
    return ", ".join(steps) or "no steps"


def read_history(storage: Storage) -> History:
    """List the root. Records first: a record that is seen has its term in the later listing.

    Raises CorruptCheckpointError for a name that is not ours, a record without its term, and data without any term
    (C15).
    """
    names = frozenset(StepRef(*_parsed(parse_record_key, storage, entry.key)) for entry in storage.list("records/"))
    terms = frozenset(_parsed(parse_term_key, storage, entry.key) for entry in storage.list("terms/"))
    orphans = sorted(ref for ref in names if ref.term not in terms)
    if orphans:
        key = record_key(orphans[0].step, orphans[0].term)
        raise CorruptCheckpointError(f"{storage.url}: {key} exists without its term; the root is damaged", key=key)
    if not terms and next(iter(storage.list("steps/")), None) is not None:
        raise CorruptCheckpointError(f"{storage.url}: there are steps/ but no terms/; the root is damaged")
    return History(storage, names, terms)


def _parsed(parse: Callable[[str], T | None], storage: Storage, key: str) -> T:
    found = parse(key)
    if found is None:
        raise CorruptCheckpointError(
            f"{storage.url}/{key}: dscheck writes no object of this name; remove it, or point to the right root",
            key=key,
        )
    return found
