"""What must hold in every state of the model, whoever crashed where."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from tests.commit.explorer import Note, Store
from tests.commit.model import Claim, Committed, Rules, ancestry, claims, committed, head, newest, visible, visible_from


class Safety:
    """`check` of one run: None, or the sentence that says which promise was broken. `first`: the store at the start."""

    def __init__(self, rules: Rules, first: Store) -> None:
        self.rules = rules
        self.acknowledged = committed(first)
        self._known: dict[int, tuple[Any, ...]] = {}
        self._believed: dict[tuple[int, frozenset[Note]], str | None] = {}

    def check(self, before: Store, after: Store, notes: frozenset[Note], new: tuple[Note, ...]) -> str | None:
        records, terms, shown, latest, incomplete = self._of(after)
        if incomplete:
            return f"{incomplete} is committed and lacks an object of its own"
        was = self._of(before)[3]
        if latest != was and (latest in self._of(before)[0] or latest is None):
            return f"newest went from {was} to {latest}, which is neither old nor new"
        if latest != was and was is not None and latest.term < was.term:
            return f"{latest} of an older term became newest after {was}"
        key = (id(after), notes)
        if key not in self._believed:
            self._believed[key] = self._beliefs(records, terms, shown, notes)
        return self._believed[key] or self._told(records, new)

    def _of(self, store: Store) -> tuple[Any, ...]:
        # Stores live as long as the explorer, which makes each content once: their identity is a safe name.
        if id(store) not in self._known:
            records, terms = committed(store), dict(claims(store))
            shown = visible(self.rules, records, terms)
            incomplete = next((r for r in records if not complete(store, r)), None)
            self._known[id(store)] = (records, terms, shown, newest(self.rules, records, terms), incomplete)
        return self._known[id(store)]

    def _beliefs(
        self,
        records: frozenset[Committed],
        terms: dict[int, Claim],
        shown: frozenset[Committed],
        notes: frozenset[Note],
    ) -> str | None:
        owners: dict[Hashable, str] = {}
        for note in notes:
            if note.event == "owns" and owners.setdefault(note.about, note.actor) != note.actor:
                return f"two jobs own term {note.about}"
            if note.event == "finds damage":
                return f"{note.actor} takes a sound root for a damaged one"
        told = {note.about for note in notes if note.event == "acknowledges" and isinstance(note.about, Committed)}
        acknowledged = self.acknowledged | told
        for record in acknowledged - shown:
            if not deliberately_abandoned(record, head(self.rules, records, terms), terms):
                return f"acknowledged {record} was replaced or left the live history"
        return None

    def _told(self, records: frozenset[Committed], new: tuple[Note, ...]) -> str | None:
        for note in new:
            if note.event == "gives up" and note.about in records:
                return f"{note.actor} reports a failure, and {note.about} is committed"
        return None


def complete(store: Store, record: Committed) -> bool:
    own = (store.get((kind, record.term, record.step)) for kind in ("data", "files"))
    return record.plan in store and all(writer == record.owner for writer in own)


def deliberately_abandoned(record: Committed, top: int | None, terms: dict[int, Claim]) -> bool:
    """A job of the live history knew of `record` and continued from elsewhere: that is what `load(300)` is for."""
    return any(
        record in terms[number].saw and not visible_from(number, {record}, terms) for number in ancestry(terms, top)
    )
