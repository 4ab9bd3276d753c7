"""What must hold in every state of the model, whoever crashed where."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

from tests.commit.explorer import Note, Store
from tests.commit.model import (
    RIGHT,
    Claim,
    Committed,
    Rules,
    ancestry,
    claims,
    committed,
    head,
    newest,
    visible,
    visible_from,
)


class Seen(NamedTuple):
    """A store as its readers see it under the rules of the run, and whose terms count by the right ones."""

    records: frozenset[Committed]
    terms: dict[int, Claim]
    shown: frozenset[Committed]
    newest: Committed | None
    limits: dict[int, float]
    incomplete: Committed | None


class Safety:
    """`check` of one run: None, or the sentence that says which promise was broken. `first`: the store at the start."""

    def __init__(self, rules: Rules, first: Store) -> None:
        self.rules = rules
        self.acknowledged = committed(first)
        self._known: dict[int, Seen] = {}
        self._moved: dict[tuple[int, int], str | None] = {}
        self._believed: dict[tuple[int, frozenset[Note]], str | None] = {}

    def check(self, before: Store, after: Store, notes: frozenset[Note], new: tuple[Note, ...]) -> str | None:
        move = id(before), id(after)
        if move not in self._moved:
            self._moved[move] = moved(self._of(before), self._of(after))
        believed = id(after), notes
        if believed not in self._believed:
            self._believed[believed] = self._beliefs(self._of(after), notes)
        return self._moved[move] or self._believed[believed] or self._told(self._of(after), new)

    def _of(self, store: Store) -> Seen:
        # Stores live as long as the explorer, which makes each content once: their identity is a safe name.
        if id(store) not in self._known:
            records, terms = committed(store), dict(claims(store))
            self._known[id(store)] = Seen(
                records,
                terms,
                visible(self.rules, records, terms),
                newest(self.rules, records, terms),
                ancestry(terms, head(RIGHT, records, terms)),
                next((r for r in records if not complete(store, r)), None),
            )
        return self._known[id(store)]

    def _beliefs(self, seen: Seen, notes: frozenset[Note]) -> str | None:
        owned: set[Hashable] = set()
        for note in notes:
            if note.event == "owns" and isinstance(note.about, tuple):
                number, claim = note.about
                if seen.terms.get(number) != claim or number in owned:
                    return f"{note.actor} takes term {number} for its own"
                owned.add(number)
            if note.event == "acknowledges" and isinstance(note.about, Committed) and forsaken(note.about, seen.terms):
                return f"{note.actor} acknowledged {note.about}, and its own claim continues from before it"
            if note.event == "finds damage":
                return f"{note.actor} takes a sound root for a damaged one"
            if (
                note.event == "finds newest"
                and isinstance(note.about, tuple)
                and not note.about[1]
                and self.acknowledged
            ):
                return f"{note.actor} finds no step in a root that never was without"
        told = {note.about for note in notes if note.event == "acknowledges" and isinstance(note.about, Committed)}
        dropped = {note.about[1] for note in notes if note.event == "drops" and isinstance(note.about, tuple)}
        for record in (self.acknowledged | told) - seen.shown - dropped:
            if record.step <= seen.limits.get(record.term, 0):
                return f"acknowledged {record} was lost or replaced, and no newer claim left it behind"
        return None

    def _told(self, seen: Seen, new: tuple[Note, ...]) -> str | None:
        for note in new:
            if note.event == "gives up" and note.about in seen.records:
                return f"{note.actor} reports a failure, and {note.about} is committed"
            if note.event == "finds newest" and isinstance(note.about, tuple) and passes_over(*note.about, seen):
                return f"{note.actor} takes {note.about[1]} for the newest, and has seen a claim of a newer one"
            if note.event == "drops" and isinstance(note.about, tuple) and note.about[0] < max(seen.terms):
                return f"{note.actor} deletes {note.about[1]}, and a newer job has claimed the root"
        return None


def moved(before: Seen, after: Seen) -> str | None:
    """What is wrong with a change of the store."""
    if after.incomplete:
        return f"{after.incomplete} is committed and lacks an object of its own"
    names = {(r.term, r.step) for r in before.records - after.records}
    if names & {(r.term, r.step) for r in after.records}:
        return f"the record of {names} was replaced"
    there = {(r.term, r.step) for r in before.records}
    claimed = [claim for number, claim in after.terms.items() if number not in before.terms and claim.parent]
    if claimed and claimed[0].parent in there:
        now = None if after.newest is None else (after.newest.term, after.newest.step)
        return None if now == claimed[0].parent else f"{claimed[0]} made {now} newest"
    if after.newest == before.newest or after.newest == without_its_claim(before, after):
        return None
    created = after.records - before.records
    if after.newest is None or after.newest not in created:
        return f"newest went from {before.newest} to {after.newest}, which was neither created nor claimed to continue"
    still = {(r.term, r.step) for r in after.records}
    if any(number > after.newest.term and claim.parent in still for number, claim in after.terms.items()):
        return f"{after.newest} became newest after a newer claim"
    return None


def without_its_claim(before: Seen, after: Seen) -> Committed | None:
    """What a claim had hidden, when the newest step, which it names, was deleted before the claim's first record."""
    gone = before.newest
    if gone is None or gone in after.records:
        return gone
    naming = [number for number, claim in after.terms.items() if claim.parent == (gone.term, gone.step)]
    if not naming or any(r.term >= min(naming) for r in after.records):
        return gone
    return newest(RIGHT, after.records, {n: claim for n, claim in after.terms.items() if n < min(naming)})


def passes_over(top: int, found: Committed | None, seen: Seen) -> bool:
    """Whether the claim of term `top` continues from a step that is there, and is newer than the one found."""
    parent = seen.terms[top].parent if top else None
    there = {(r.term, r.step) for r in seen.records}
    return parent in there and parent is not None and (found is None or (found.term, found.step) < parent)


def forsaken(record: Committed, terms: dict[int, Claim]) -> bool:
    """Whether a later claim of its own owner leaves `record` behind."""
    return any(
        number > record.term and claim.owner == record.owner and not visible_from(number, {record}, terms)
        for number, claim in terms.items()
    )


def complete(store: Store, record: Committed) -> bool:
    own = (store.get((kind, record.term, record.step)) for kind in ("data", "files"))
    return record.plan in store and all(writer == record.owner for writer in own)
