"""The code itself under the explorer: every interleaving of real claims and publications, with one fault."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

import pytest

from dscheck.commit import StepRef, claim, publish, read_history
from dscheck.commit.gc import collect
from dscheck.commit.retention import Retention
from dscheck.config import Keep
from dscheck.errors import DscheckError, StorageError, SupersededError
from dscheck.manifest.keys import data_key, deletion_key, record_key
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


def job(me: str, step: int, resume: int | None = None, fresh: bool = False) -> Actor:
    """Load, claim, save."""

    def run(storage: Replay, tell: Tell) -> None:
        try:
            history = read_history(storage)
            found = history.resolve(resume)
            parent = (found.term, found.step) if found else None
            if found and found.step >= step and not fresh:
                return
            if history.newest is None and resume is None:
                tell("finds nothing", None)
            parent = None if fresh else parent
            term = claim(storage, seen=history.newest_term, parent=parent, run="run", host=me, now=0.0)
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


def keeper(me: str, term: int, step: int) -> Actor:
    """It claimed its term long ago, and keeps one step."""

    def run(storage: Replay, tell: Tell) -> None:
        with suppress(DscheckError):
            put_data(storage, step, term, me)
            publish(storage, a_record(step, term, f"id-{term}", id=me))
            tell("acknowledges", StepRef(step, term))
            Retention(storage, Keep(last=1)).run(a_term(term), (), by=me, now=0.0)

    return real(me, run)


def back_to(parent: int, step: int) -> Actor:
    """The owner of term 2, from its claim on, in as few steps as that takes."""

    def run(storage: Replay, tell: Tell) -> None:
        if storage.put_if_absent("terms/2.json", a_term(2, (1, parent)).encode()):
            put_data(storage, step, 2, "job")
            storage.put_if_absent(record_key(step, 2), a_record(step, 2, "id-2", id="job").encode())
            tell("acknowledges", StepRef(step, 2))

    return real("job", run)


def gc(me: str) -> Actor:
    """All of it, abandoned steps included."""

    def run(storage: Replay, tell: Tell) -> None:
        with suppress(DscheckError):
            collect(storage, by=me, now=0.0, abandoned=True)

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


def root(*steps: int, fresh: bool = False) -> dict[tuple[Any, ...], Any]:
    """Steps of term 1, and with `fresh` a term 2 that continues from none and has no step yet."""
    store: dict[tuple[Any, ...], Any] = {name("terms/1.json"): a_term(1).encode()}
    if fresh:
        store[name("terms/2.json")] = a_term(2).encode()
    for step in steps:
        store[name(record_key(step, 1))] = a_record(step, 1, "id-1", id=f"old-{step}").encode()
        store[name(data_key(step, 1, 0))] = b"old"
    return store


class Seen(NamedTuple):
    newest: StepRef | None
    shown: frozenset[StepRef]
    parents: tuple[tuple[int, int] | None, ...]


def marked(ref: StepRef, store: Store) -> bool:
    return name(deletion_key(ref.step, ref.term)) in store


def there(parent: tuple[int, int], store: Store) -> bool:
    """Whether the step that a claim names is there."""
    ref = StepRef(parent[1], parent[0])
    return name(record_key(ref.step, ref.term)) in store and not marked(ref, store)


class Promises:
    """S1 to S5 of docs/commit.md, read through the code itself; S6 is that it can be read. `first`: at the start."""

    def __init__(self, first: Store) -> None:
        self._known: dict[int, Seen] = {}
        self._empty = not first

    def check(self, before: Store, after: Store, notes: frozenset[Note], new: tuple[Note, ...]) -> str | None:
        was, now = self._of(before), self._of(after)
        for ref in now.shown:
            if name(data_key(ref.step, ref.term, 0)) not in after:
                return f"{ref} lacks its data"
        owners = [note.about for note in notes if note.event == "owns"]
        if len(owners) != len(set(owners)):
            return f"a term has two owners: {owners}"
        told = {note.about for note in notes if note.event == "acknowledges" and isinstance(note.about, StepRef)}
        for ref in told - now.shown:
            if not marked(ref, after) and not self._claimed_after(ref, now):
                return f"the acknowledged {ref} left the live history without a newer claim"
        if any(note.event == "finds nothing" for note in new) and not self._empty:
            return "a job finds no step in a root that never was without"
        return self._moved(was, now, before, after) or self._told(after, new)

    def _moved(self, was: Seen, now: Seen, before: Store, after: Store) -> str | None:
        newest = now.newest
        claimed = now.parents[-1] if len(now.parents) > len(was.parents) else None
        if claimed and there(claimed, before):
            return None if newest == StepRef(claimed[1], claimed[0]) else f"a claim of {claimed} made {newest} newest"
        if newest == was.newest or (was.newest and newest == self._without_its_claim(was.newest, now, after)):
            return None
        newer = any(parent and there(parent, after) for parent in now.parents[newest.term :]) if newest else False
        if newest is None or name(record_key(newest.step, newest.term)) in before or newer:
            return f"newest went from {was.newest} to {newest}"
        return None

    def _without_its_claim(self, gone: StepRef, now: Seen, after: Store) -> StepRef | None:
        """What a claim had hidden that named the newest step, which was deleted before the claim's first record."""
        naming = [number for number, parent in enumerate(now.parents, 1) if parent == (gone.term, gone.step)]
        if not naming or not marked(gone, after):
            return gone
        left = {key: data for key, data in after.items() if key != name(f"terms/{naming[0]}.json")}
        return read_history(Fixed(left)).newest

    def _claimed_after(self, ref: StepRef, seen: Seen) -> bool:
        began_anew = any(shown.term > ref.term for shown in seen.shown)
        return began_anew or any(parent and parent < (ref.term, ref.step) for parent in seen.parents[ref.term :])

    def _told(self, after: Store, new: tuple[Note, ...]) -> str | None:
        for note in new:
            if note.event == "gives up" and isinstance(note.about, StepRef):
                key = record_key(note.about.step, note.about.term)
                stored = after.get(name(key))
                if stored is not None and not isinstance(decode_record(stored, key), Tombstone):
                    return f"{note.actor} reports a failure, and {note.about} is committed"
        return None

    def _of(self, store: Store) -> Seen:
        if id(store) not in self._known:
            history = read_history(Fixed(store))
            parents = tuple(history.claim(number).parent for number in history.terms)
            self._known[id(store)] = Seen(history.newest, frozenset(history.visible), parents)
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
        "a fresh start, and the old job",
        root(100, 200),
        {"zombie": zombie("zombie", 1, 300), "job": job("job", 50, fresh=True)},
        faults=("lost", "ghost", "echo"),
        fragile=("records", "terms"),
        budget=1,
    ),
    Scenario(
        "the first record of a fresh start, and two restarted jobs that look meanwhile",
        root(100, fresh=True),
        {"fresh": zombie("fresh", 2, 10), "one": job("one", 200), "two": job("two", 300)},
    ),
    Scenario(
        "gc, a zombie and a restarted job",
        root(100),
        {"zombie": zombie("zombie", 1, 200), "job": job("job", 200), "gc": gc("gc")},
    ),
    Scenario(
        "a job that keeps one step, one that goes back, and gc",
        root(100),
        {"zombie": keeper("zombie", 1, 200), "job": back_to(100, 110), "gc": gc("gc")},
    ),
    Scenario(
        "a job that keeps one step, and one that starts beside it",
        root(100),
        {"zombie": keeper("zombie", 1, 200), "job": job("job", 300)},
        faults=("lost", "ghost", "echo"),
        fragile=("records",),
        budget=1,
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
    return Explorer(scenario, Promises(scenario.store).check).run()


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_no_interleaving_of_the_code_breaks_a_promise(scenario: Scenario) -> None:
    """commit P3, P10, P11, P14, P16, P17, P22"""
    found = explored(scenario)
    assert {note.actor for note in found.notes if note.event == "acknowledges"} >= scenario.actors.keys() - {"gc"}
    assert found.states > 400
