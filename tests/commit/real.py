"""The functions of dscheck.commit as actors of the explorer: run again and again, on the answers so far."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from dscheck.errors import CheckpointNotFoundError, StorageError
from dscheck.storage.base import Entry, ObjectWriter
from tests.commit.explorer import ERROR, Actor, Delete, Get, Key, Look, Note, Put, Step, Store

Tell = Callable[[str, Hashable], None]


class Pending(BaseException):
    """The next storage step has no answer yet. No handler of the code under test may catch it."""

    def __init__(self, step: Step) -> None:
        self.step = step


class Replay:
    """A Storage that answers from a list, and stops the code at the first step without an answer."""

    url = "replay://"

    def __init__(self, answers: tuple[Any, ...], noted: list[Note]) -> None:
        self._answers = list(reversed(answers))
        self._noted = noted

    def put_if_absent(self, key: str, data: bytes) -> bool:
        answer = self._answer(Put(name(key), data))
        if answer == ERROR:
            raise StorageError("injected", key=key)
        assert isinstance(answer, bool)
        return answer

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        assert (offset, length) == (0, None)
        answer = self._answer(Get(name(key)))
        if answer is None:
            raise CheckpointNotFoundError(f"no {key}", key=key)
        assert isinstance(answer, bytes)
        return answer

    def list(self, prefix: str) -> Iterator[Entry]:
        return iter([Entry(*entry) for entry in self._answer(Look(below(prefix)))])

    def create(self, key: str) -> ObjectWriter:
        raise NotImplementedError

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        raise NotImplementedError

    def delete(self, key: str) -> None:
        self._answer(Delete(name(key)))

    def _answer(self, step: Step) -> Any:
        if not self._answers:
            raise Pending(step)
        self._noted.clear()
        return self._answers.pop()


class Fixed(Replay):
    """The storage of one state, for the checks."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def _answer(self, step: Step) -> Any:
        if isinstance(step, Get):
            return self._store.get(step.key)
        assert isinstance(step, Look)
        return step.view(self._store)


def name(key: str) -> Key:
    """The explorer's key: its folder first, by which faults are aimed."""
    return key.split("/")[0], key


@cache
def below(prefix: str) -> Callable[[Store], Hashable]:
    def view(store: Store) -> Hashable:
        return tuple(sorted((key[1], len(data)) for key, data in store.items() if key[1].startswith(prefix)))

    view.__name__ = prefix
    return view


def real(me: str, run: Callable[[Replay, Tell], None]) -> Actor:
    """`run(storage, tell)` as an actor; the ids that it draws are the same each time."""

    def replay(answers: tuple[Any, ...]) -> tuple[Step | None, tuple[Note, ...]]:
        noted: list[Note] = []
        numbers = itertools.count()
        ids = SimpleNamespace(uuid4=lambda: SimpleNamespace(hex=f"{me}-{next(numbers)}"))
        with patch("dscheck.commit.term.uuid", ids):
            try:
                run(Replay(answers, noted), lambda event, about: noted.append(Note(event, me, about)))
            except Pending as pending:
                return pending.step, tuple(noted)
        return None, tuple(noted)

    return replay
