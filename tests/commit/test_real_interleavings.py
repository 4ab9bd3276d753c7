"""The code itself under the explorer: every interleaving of real claims and publications, with one fault."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest

from dscheck.commit import StepRef, claim, publish, read_history
from dscheck.errors import DscheckError, StorageError, SupersededError
from dscheck.manifest.keys import data_key, record_key
from dscheck.manifest.record import Tombstone, decode_record
from dscheck.storage.base import Storage
from tests.commit.explorer import Actor, Explored, Explorer, Note, Scenario, Store
from tests.commit.jobs import a_record, a_term
from tests.commit.real import Fixed, Replay, Tell, name, real


def put_data(storage: Storage, step: int, term: int, owner: str) -> None:
    storage.put_if_absent(data_key(step, term, 0), owner.encode())


def zombie(me: str, term: int, step: int) -> Actor:
    """It claimed its term long ago."""

    def run(storage: Replay, tell: Tell) -> None:
        try:
            put_data(storage, step, term, me)
            publish(storage, a_record(step, term, f"id-{term}", id=me))
            tell("acknowledges", StepRef(step, term))
        except SupersededError:
            return
        except DscheckError:
            tell("gives up", StepRef(step, term))

    return real(me, run)


def job(me: str, step: int, resume: int | None = None) -> Actor:
    """Load, claim, save."""

    def run(storage: Replay, tell: Tell) -> None:
        try:
            history = read_history(storage)
            found = history.resolve(resume)
            parent = (found.term, found.step) if found else None
            if found and found.step >= step:
                return
            if resume is not None:
                tell("leaves", history.names)
            term = claim(
                storage,
                seen=history.newest_term,
                parent=parent,
                run="run",
                host=me,
                now=0.0,
                newest=history.newest,
            )
        except DscheckError:
            return
        tell("owns", term.term)
        try:
            put_data(storage, step, term.term, me)
            publish(storage, a_record(step, term.term, term.id, id=me))
            tell("acknowledges", StepRef(step, term.term))
        except SupersededError:
            return
        except DscheckError:
            tell("gives up", StepRef(step, term.term))

    return real(me, run)


def undertaker(term: int, step: int) -> Actor:
    """What gc does first: it takes the name of an attempt in an older term."""

    def run(storage: Replay, tell: Tell) -> None:
        if read_history(storage).newest_term <= term:
            return
        with suppress(StorageError):
            if storage.put_if_absent(record_key(step, term), Tombstone(step, term, "gc", 0.0).encode()):
                tell("buries", StepRef(step, term))

    return real("gc", run)


def root(*steps: int) -> dict[tuple[Any, ...], Any]:
    store: dict[tuple[Any, ...], Any] = {name("terms/1.json"): a_term(1).encode()}
    for step in steps:
        store[name(record_key(step, 1))] = a_record(step, 1, "id-1", id=f"old-{step}").encode()
        store[name(data_key(step, 1, 0))] = b"old"
    return store


class Promises:
    """S1 to S5 of docs/commit.md, read through the code itself; S6 is that it can be read."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[StepRef | None, frozenset[StepRef]]] = {}

    def check(self, before: Store, after: Store, notes: frozenset[Note], new: tuple[Note, ...]) -> str | None:
        newest, shown = self._of(after)
        was, _ = self._of(before)
        if newest != was and (newest is None or name(record_key(newest.step, newest.term)) in before):
            return f"newest went from {was} to {newest}"
        for ref in shown:
            if name(data_key(ref.step, ref.term, 0)) not in after:
                return f"{ref} lacks its data"
        owners = [note.about for note in notes if note.event == "owns"]
        if len(owners) != len(set(owners)):
            return f"a term has two owners: {owners}"
        left = {
            ref for note in notes if note.event == "leaves" and isinstance(note.about, frozenset) for ref in note.about
        }
        for note in notes:
            if note.event == "acknowledges" and note.about not in shown | left:
                return f"{note.actor}'s acknowledged {note.about} left the live history"
        return self._told(after, new)

    def _told(self, after: Store, new: tuple[Note, ...]) -> str | None:
        for note in new:
            if note.event == "gives up" and isinstance(note.about, StepRef):
                key = record_key(note.about.step, note.about.term)
                stored = after.get(name(key))
                if stored is not None and not isinstance(decode_record(stored, key), Tombstone):
                    return f"{note.actor} reports a failure, and {note.about} is committed"
        return None

    def _of(self, store: Store) -> tuple[StepRef | None, frozenset[StepRef]]:
        if id(store) not in self._known:
            history = read_history(Fixed(store))
            self._known[id(store)] = history.newest, frozenset(history.visible)
        return self._known[id(store)]


SCENARIOS = [
    Scenario(
        "a zombie, a restarted job, and a tombstone",
        root(100),
        {"zombie": zombie("zombie", 1, 200), "job": job("job", 200), "gc": undertaker(1, 200)},
        faults=("lost", "ghost"),
        fragile=("records",),
        budget=1,
    ),
    Scenario(
        "a rollback and a zombie",
        root(300, 500),
        {"zombie": zombie("zombie", 1, 600), "job": job("job", 310, resume=300)},
        faults=("lost", "ghost", "echo"),
        fragile=("records", "terms"),
        budget=1,
    ),
    Scenario(
        "two restarted jobs and a zombie",
        root(100),
        {"zombie": zombie("zombie", 1, 200), "one": job("one", 300), "two": job("two", 400)},
    ),
    Scenario(
        "two first jobs",
        {},
        {"one": job("one", 100), "two": job("two", 100)},
        faults=("lost", "ghost", "echo"),
        fragile=("records", "terms"),
        budget=1,
    ),
]


def explored(scenario: Scenario) -> Explored:
    return Explorer(scenario, Promises().check).run()


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_no_interleaving_of_the_code_breaks_a_promise(scenario: Scenario) -> None:
    """commit P3, P5, P11, P12, P13, P16, P18, P19, P24"""
    found = explored(scenario)
    assert {note.actor for note in found.notes if note.event == "acknowledges"} >= scenario.actors.keys() - {"gc"}
    assert found.states > 500
