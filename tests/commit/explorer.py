"""Every interleaving of a few actors over one storage, by depth-first search that visits no state twice.

An actor is deterministic: the answers that it has received are its whole local state, and running it again on them says
its next step. An actor that stops for good is one that is not scheduled again: since the safety properties are checked
in every state, a crash of any actor after any step needs no step of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Key = tuple[Any, ...]
Store = Mapping[Key, Any]
Items = frozenset[tuple[Key, Any]]


class Put(NamedTuple):
    """Create an object; True, False when the name is taken, or ERROR when a fault hides what happened."""

    key: Key
    value: Hashable
    replaces: bool = False


class Get(NamedTuple):
    key: Key


class Delete(NamedTuple):
    key: Key


class Look(NamedTuple):
    """One atomic listing, reduced to what the actor uses of it (fewer answers, fewer states)."""

    view: Callable[[Store], Hashable]


class Note(NamedTuple):
    """What an actor now believes or tells its user: no storage step, so it happens at once."""

    event: str
    actor: str
    about: Hashable


Step = Put | Get | Delete | Look
Actor = Callable[[tuple[Any, ...]], tuple[Step | None, tuple[Note, ...]]]
"""From the answers so far to the next step (None: finished) and what was noted since the last answer."""
ERROR = "ERROR"


class Violation(Exception):
    """A state that must not exist, with the steps that lead there."""


@dataclass(frozen=True)
class Scenario:
    """`faults`: which may befall a put whose key starts with one of `fragile`, `budget` times in one run.

    lost: done, but an error is reported. ghost: an error is reported, and it is done at any later time, or never.
    echo: done, and a copy of the same request arrives at any later time.
    dropped: success is reported, and nothing is there.
    """

    name: str
    store: Store
    actors: Mapping[str, Actor]
    faults: tuple[str, ...] = ()
    fragile: tuple[str, ...] = ()
    budget: int = 0


@dataclass
class Explored:
    states: int = 0
    transitions: int = 0
    notes: set[Note] = field(default_factory=set)


Move = tuple[str, Step, Any]
"""Who did what, and the answer."""


class _Local(NamedTuple):
    """One actor after some answers: its next step (None: finished) and what it noted on the way there."""

    answers: tuple[Any, ...]
    step: Step | None
    noted: tuple[Note, ...]


@dataclass(frozen=True)
class _State:
    store: Items
    ghosts: Items
    notes: frozenset[Note]
    locals: tuple[int, ...]
    budget: int


class Explorer:
    """Runs one scenario. `check(before, after, notes, new)` returns what is wrong, or None, for every transition."""

    def __init__(
        self, scenario: Scenario, check: Callable[[Store, Store, frozenset[Note], tuple[Note, ...]], str | None]
    ) -> None:
        self.scenario = scenario
        self.check = check
        self.names = tuple(scenario.actors)
        self._locals: list[_Local] = []
        self._children: dict[tuple[int, int, Any], int] = {}
        self._stores: dict[Items, dict[Key, Any]] = {}
        self._views: dict[tuple[Items, Callable[[Store], Hashable]], Hashable] = {}

    def run(self) -> Explored:
        found = Explored()
        first = _State(
            store=frozenset(self.scenario.store.items()),
            ghosts=frozenset(),
            notes=frozenset(),
            locals=tuple(self._start(name) for name in self.names),
            budget=self.scenario.budget,
        )
        seen = {first}
        stack: list[tuple[_State, tuple[Any, ...]]] = [(first, ())]
        while stack:
            state, trace = stack.pop()
            found.states += 1
            for what, after, new in self._moves(state):
                found.transitions += 1
                path = (trace, what)
                wrong = self.check(self._store(state.store), self._store(after.store), after.notes, new)
                if wrong is not None:
                    raise Violation(f"{self.scenario.name}: {wrong}\n" + _written(path, new))
                found.notes.update(new)
                if after not in seen:
                    seen.add(after)
                    stack.append((after, path))
        return found

    def _moves(self, state: _State) -> list[tuple[Move, _State, tuple[Note, ...]]]:
        moves: list[tuple[Move, _State, tuple[Note, ...]]] = []
        for index, name in enumerate(self.names):
            step = self._locals[state.locals[index]].step
            if step is None:
                continue
            for answer, store, ghosts, budget, how in self._outcomes(step, state):
                child = self._advance(index, state.locals[index], answer)
                new = self._locals[child].noted
                locals_ = (*state.locals[:index], child, *state.locals[index + 1 :])
                after = _State(store, ghosts, state.notes.union(new), locals_, budget)
                moves.append(((name, step, how or answer), after, new))
        for key, value in state.ghosts:
            store = state.store if key in self._store(state.store) else state.store | {(key, value)}
            after = _State(store, state.ghosts - {(key, value)}, state.notes, state.locals, state.budget)
            moves.append((("network", Put(key, value), "late"), after, ()))
        return moves

    def _outcomes(self, step: Step, state: _State) -> list[tuple[Any, Items, Items, int, str]]:
        items, store = state.store, self._store(state.store)
        if isinstance(step, Look):
            if (items, step.view) not in self._views:
                self._views[items, step.view] = step.view(store)
            return [(self._views[items, step.view], items, state.ghosts, state.budget, "")]
        if isinstance(step, Get):
            return [(store.get(step.key), items, state.ghosts, state.budget, "")]
        if isinstance(step, Delete):
            gone = items - {(step.key, store.get(step.key))}
            return [(True, gone, state.ghosts, state.budget, "")]
        taken = step.key in store and not step.replaces
        done: Items = items if taken else (items - {(step.key, store.get(step.key))}) | {(step.key, step.value)}
        outcomes: list[tuple[Any, Items, Items, int, str]] = [(not taken, done, state.ghosts, state.budget, "")]
        if state.budget and step.key[0] in self.scenario.fragile:
            late = state.ghosts | {(step.key, step.value)}
            faults: dict[str, tuple[Any, Items, Items]] = {
                "lost": (ERROR, done, state.ghosts),
                "ghost": (ERROR, items, late),
                "echo": (not taken, done, late),
                "dropped": (True, items, state.ghosts),
            }
            outcomes += [(*faults[kind], state.budget - 1, kind) for kind in self.scenario.faults]
        return outcomes

    def _store(self, items: Items) -> dict[Key, Any]:
        if items not in self._stores:
            self._stores[items] = dict(items)
        return self._stores[items]

    def _start(self, name: str) -> int:
        return self._remember(name, ())

    def _advance(self, index: int, local: int, answer: Any) -> int:
        key = (index, local, answer)
        if key not in self._children:
            self._children[key] = self._remember(self.names[index], (*self._locals[local].answers, answer))
        return self._children[key]

    def _remember(self, name: str, answers: tuple[Any, ...]) -> int:
        step, noted = self.scenario.actors[name](answers)
        self._locals.append(_Local(answers, step, noted))
        return len(self._locals) - 1


def actor(run: Callable[[], Generator[Step | Note, Any, Any]]) -> Actor:
    """An actor written as a generator that yields steps and notes, and is sent the answers to its steps."""

    def replay(answers: tuple[Any, ...]) -> tuple[Step | None, tuple[Note, ...]]:
        running = run()
        noted: list[Note] = []
        remaining = list(reversed(answers))
        answer: Any = None
        while True:
            try:
                step = running.send(answer)
            except StopIteration:
                return None, tuple(noted)
            answer = None
            if isinstance(step, Note):
                noted.append(step)
            elif remaining:
                answer = remaining.pop()
                noted.clear()
            else:
                return step, tuple(noted)

    return replay


def _named(step: Step) -> str:
    if isinstance(step, Look):
        return f"list for {step.view.__name__}"
    return f"{type(step).__name__.lower()} {step.key}" + (f" = {step.value}" if isinstance(step, Put) else "")


def _written(path: tuple[Any, ...], new: tuple[Note, ...]) -> str:
    lines: list[str] = [f"  {note.actor} {note.event} {note.about}" for note in reversed(new)]
    while path:
        path, (name, step, answer) = path
        lines.append(f"  {name}: {_named(step)} -> {answer}")
    return "\n".join(reversed(lines))
