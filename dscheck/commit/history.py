"""Which steps exist, and which of them are the live history: those on the ancestry of the newest claimed term (C2)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property

from dscheck.commit.listing import (
    LOOKS,
    Changed,
    Names,
    StepRef,
    list_records,
    list_terms,
    read_deletion,
    read_step,
    unsteady,
)
from dscheck.commit.term import read_term
from dscheck.errors import CheckpointNotFoundError, CorruptCheckpointError
from dscheck.manifest.keys import record_key, term_key
from dscheck.manifest.record import Record, Term, Tombstone
from dscheck.storage.base import Objects


@dataclass(frozen=True)
class History:
    """What a root held when it was listed. `names`: of all records that are not deleted; some may be tombstones.

    `deleted`: the steps that were deleted before. `newest_term` is the highest claimed term, 0 for none. Terms and
    records are read when asked for, each once.
    """

    storage: Objects
    names: frozenset[StepRef]
    deleted: frozenset[StepRef]
    newest_term: int
    _claims: dict[int, Term] = field(default_factory=dict, repr=False, compare=False)
    _found: dict[StepRef, Record | Tombstone | None] = field(default_factory=dict, repr=False, compare=False)

    @property
    def terms(self) -> range:
        """All claimed terms."""
        return range(1, self.newest_term + 1)

    @cached_property
    def run(self) -> str | None:
        """The id of the root's first term: the identity of the run; None before there is any."""
        return self.claim(1).run if self.newest_term else None

    @cached_property
    def newest(self) -> StepRef | None:
        """The greatest step of the live history, None for none (P16). Steps ascend along it: the first found counts."""
        return next((ref for ref in self._live_names() if self._still(ref)), None)

    @cached_property
    def visible(self) -> tuple[StepRef, ...]:
        """The steps of the live history, ascending (P17). Reads every record that is not of the newest term."""
        steps: dict[int, StepRef] = {}
        for ref in self._live_names():
            if ref.step not in steps and self._exists(ref):
                steps[ref.step] = ref
        return tuple(sorted(steps.values()))

    @property
    def abandoned(self) -> tuple[StepRef, ...]:
        """Committed steps outside the live history, ascending."""
        live = set(self.visible)
        return tuple(sorted(ref for ref in self.names if ref not in live and self._exists(ref)))

    def claim(self, number: int) -> Term:
        """The claim of one term."""
        if number not in self._claims:
            self._claims[number] = read_term(self.storage, number)
        return self._claims[number]

    def record(self, ref: StepRef) -> Record:
        """The record of one step. Raises CheckpointNotFoundError when it is gone, or a tombstone."""
        found = self._read(ref)
        if isinstance(found, Record):
            return found
        key = record_key(ref.step, ref.term)
        deletion = None if found else read_deletion(self.storage, ref)
        how = "was never committed: gc gave it up" if found else "vanished after the root was listed"
        if deletion is not None:
            how = f"was deleted meanwhile ({deletion.by})"
        raise CheckpointNotFoundError(
            f"{self.storage.url}/{key}: step {ref.step} of term {ref.term} {how}", key=key, step=ref.step, term=ref.term
        )

    def records(self) -> dict[StepRef, Record]:
        """All committed steps, live or abandoned. Those that were deleted after the listing are left out."""
        return {ref: found for ref in self.names if isinstance(found := self._read(ref), Record)}

    def given_up(self, ref: StepRef) -> bool:
        """Whether a tombstone has the step's name."""
        return ref in self.names and isinstance(self._read(ref), Tombstone)

    def resolve(self, step: int | None) -> Record | None:
        """The record of `step`, or of the newest one; None when the newest is asked for and there is none.

        Raises CheckpointNotFoundError: for an abandoned step it says which term holds it, else which steps are near;
        CorruptCheckpointError when the record is not of the job that claimed its term.
        """
        ref = self.newest if step is None else self._live(step)
        if ref is None:
            if step is None:
                return None
            raise self._no_such(step)
        record, term = self.record(ref), self.claim(ref.term)
        if record.term_id != term.id:
            key = record_key(ref.step, ref.term)
            raise CorruptCheckpointError(
                f"{self.storage.url}/{key}: written under the claim {record.term_id}, and {term_key(ref.term)} is "
                f"{term.id}; two roots were mixed: restore this one from a copy",
                key=key,
            )
        return record

    def _live(self, step: int) -> StepRef | None:
        """The step of the live history with that number, without reading the records of the others."""
        return next((ref for ref in self._live_names() if ref.step == step and self._exists(ref)), None)

    def _no_such(self, step: int) -> CheckpointNotFoundError:
        holder = next((ref for ref in reversed(self.abandoned) if ref.step == step), None)
        if holder is None:
            deleted = any(ref.step == step for ref in self.deleted)
            what = f"step {step} was deleted" if deleted else f"there is no step {step}"
            return CheckpointNotFoundError(
                f"{self.storage.url}: {what}; committed are {_near(step, self.visible)}", step=step
            )
        return CheckpointNotFoundError(
            f"{self.storage.url}: step {step} was committed by term {holder.term}, on a branch that was abandoned when "
            f"a later term continued from an earlier step; the live history has {_near(step, self.visible)}",
            step=step,
            term=holder.term,
        )

    @cached_property
    def _head(self) -> int | None:
        """The term whose ancestry is the live history: the highest with a record, or whose parent is there (P16)."""
        return next((number for number in reversed(self.terms) if self.begun(number) or self._continues(number)), None)

    def _settled(self, known: int) -> bool:
        """Whether no claim was passed over that came after the records were listed. `known`: a term claimed before.

        The step that such a claim continues from may be younger than the listing, too: then it looks deleted. Raises
        Changed.
        """
        passed_over = range(max(known, self._head or 0) + 1, self.newest_term + 1)
        return all(self.claim(number).parent is None for number in passed_over)

    def begun(self, number: int) -> bool:
        """Whether a term has a step of its own."""
        return any(self._still(ref) for ref in self._by_term.get(number, ()))

    def _continues(self, number: int) -> bool:
        """Whether the step that a term continues from is there."""
        parent = self.claim(number).parent
        if parent is None:
            return False
        ref = StepRef(parent[1], parent[0])
        return ref in self.names and self._still(ref)

    def _live_names(self) -> Iterator[StepRef]:
        """The names of the live history, by descending term and step."""
        return self.names_from(self._head)

    def names_from(self, number: int | None) -> Iterator[StepRef]:
        """The names on the ancestry of a term: of each parent those up to the one resumed from (P17)."""
        limit: int | None = None
        while number is not None:
            yield from (ref for ref in self._by_term.get(number, ()) if limit is None or ref.step <= limit)
            parent = self.claim(number).parent
            number, limit = (None, None) if parent is None else (parent[0], _lower(limit, parent[1]))

    @cached_property
    def _by_term(self) -> dict[int, list[StepRef]]:
        found: dict[int, list[StepRef]] = {}
        for ref in sorted(self.names, reverse=True):
            found.setdefault(ref.term, []).append(ref)
        return found

    def _read(self, ref: StepRef) -> Record | Tombstone | None:
        if ref not in self._found:
            self._found[ref] = read_step(self.storage, ref)
        return self._found[ref]

    def _still(self, ref: StepRef) -> bool:
        """Whether it is a step. Raises Changed when it was listed and is gone (P15)."""
        found = self._read(ref)
        if found is None:
            raise Changed
        return isinstance(found, Record)

    def _exists(self, ref: StepRef) -> bool:
        # Only terms older than the newest can have tombstones (P22), and terms were listed after the records.
        return ref.term == self.newest_term or isinstance(self._read(ref), Record)


def read_history(storage: Objects, known: History | None = None) -> History:
    """List the root: records first, then terms, so that a record that is seen has its term in the later listing (P14).

    The newest step is known when this returns: the record that it names was there. What `known` has read of the same
    root is not read again: no object changes.

    Raises CorruptCheckpointError (P19) for a name that is not ours, a gap in the terms, a record without its term,
    and plans or steps without any term; CheckpointNotFoundError when something keeps deleting what is newest (P15).
    """
    claims, found = ({}, {}) if known is None else (known._claims, known._found)
    seen = 0
    for _ in range(LOOKS):
        names, newest_term = list_records(storage), list_terms(storage)
        _refuse_orphans(storage, names, newest_term)
        read = {ref: found[ref] for ref in names.steps & found.keys() if found[ref] is not None}
        history = History(storage, names.steps, names.deleted, newest_term, dict(claims), read)
        with suppress(Changed):
            _ = history.newest
            if history._settled(seen):
                return history
        seen, claims = newest_term, history._claims
    raise unsteady(storage)


def _refuse_orphans(storage: Objects, names: Names, newest_term: int) -> None:
    orphan = next((ref for ref in sorted(names.taken | names.deleted) if not 1 <= ref.term <= newest_term), None)
    if orphan is not None:
        key = record_key(orphan.step, orphan.term)
        raise CorruptCheckpointError(
            f"{storage.url}/{key}: it is there, and {term_key(orphan.term)} is not; the root is damaged: restore it "
            "from a copy",
            key=key,
        )
    if newest_term:
        return
    for folder in ("steps/", "plans/"):
        if next(iter(storage.list(folder)), None) is not None and not list_terms(storage):
            raise CorruptCheckpointError(
                f"{storage.url}: there is {folder} and no terms/; the root is damaged: restore it from a copy",
                key=folder,
            )


def _lower(limit: int | None, step: int) -> int:
    return step if limit is None else min(limit, step)


def _near(step: int, refs: tuple[StepRef, ...]) -> str:
    """The steps around `step`, and the newest: "..., 200, 300, 400, 500, ..., 900"."""
    steps = [ref.step for ref in refs]
    first = max(0, sum(found < step for found in steps) - 2)
    shown = [str(found) for found in steps[first : first + 4]]
    before = ["..."] if first else []
    rest = len(steps) - first - len(shown)
    after = (["..."] if rest > 1 else []) + ([str(steps[-1])] if rest > 0 else [])
    return ", ".join([*before, *shown, *after]) or "no steps"
