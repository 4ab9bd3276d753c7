"""A term is one job's claim on a root: numbered, put once, and the proof that the root is one place for all ranks."""

from __future__ import annotations

import time
import uuid
from dataclasses import replace

from dscheck.commit.once import put_once, read_if_there
from dscheck.errors import CorruptCheckpointError, NoConditionError, StorageError, SupersededError
from dscheck.manifest.keys import term_key
from dscheck.manifest.record import Term, decode_term
from dscheck.storage.base import MayLackCondition, Objects, Storage


def claim(
    storage: Storage,
    *,
    seen: int,
    parent: tuple[int, int] | None,
    run: str | None,
    host: str,
    now: float,
    identity: str | None = None,
) -> Term:
    """Claim term `seen` + 1, which continues from `parent` (term, step), or from nothing.

    With a parent the live history goes on from there at once; without one, with the first record (P16).
    `identity` is the claim's id, a new one by default.
    Raises SupersededError, with id, term, host and time of the other claim, when that one was faster; NoConditionError
    when the storage does not honour put-if-absent (P4); StorageError when it fails: then the claim may still arrive,
    and this job has no term.
    """
    assert_condition(storage)
    identity = identity or uuid.uuid4().hex
    term = Term(seen + 1, identity, run or identity, parent, host, now)
    key = term_key(term.term)
    winner = decode_term(put_once(storage, key, term.encode()), key)
    if winner.id != term.id:
        raise _superseded(storage, winner, "another job was faster")
    assert_honest(storage, term)
    return term


def assert_condition(storage: Storage) -> None:
    """The storage says that it honours put-if-absent, if it may not. Raises NoConditionError."""
    lack = storage.lacks_condition() if isinstance(storage, MayLackCondition) else None
    if lack is not None:
        raise _no_condition(storage, lack)


def confirm(storage: Storage, term: int, identity: str) -> Term:
    """This process sees the claim that rank 0 made. Raises StorageError when it does not: its root is another place."""
    key = term_key(term)
    stored = read_if_there(storage, key)
    found = None if stored is None else decode_term(stored, key)
    if found is not None and found.id == identity:
        return found
    seen = "nothing" if found is None else f"the claim {found.id}"
    raise StorageError(
        f"{storage.url}/{key}: rank 0 wrote the claim {identity} there, this process sees {seen}; the root is not one "
        "shared place (a node's own disk?), or it was removed: choose a root that all nodes share",
        url=storage.url,
        key=key,
    )


def assert_newest(storage: Storage, term: Term) -> None:
    """No newer term exists. Raises SupersededError with the newer one's term, host and time."""
    refuse_newer(storage, term.term)


def refuse_newer(storage: Storage, term: int) -> None:
    """`assert_newest` for a term of which only the number is known. Terms have no gaps, so one read tells."""
    key = term_key(term + 1)
    stored = read_if_there(storage, key)
    if stored is not None:
        raise _superseded(storage, decode_term(stored, key), "another job has taken over")


def read_term(storage: Objects, number: int) -> Term:
    """The claim of one term. Raises CorruptCheckpointError when it is gone: terms are never deleted."""
    key = term_key(number)
    stored = read_if_there(storage, key)
    if stored is None:
        raise CorruptCheckpointError(
            f"{storage.url}/{key}: other objects name this term, and it is gone; the root is damaged: restore it from "
            "a copy",
            key=key,
        )
    return decode_term(stored, key)


def assert_honest(storage: Storage, term: Term) -> None:
    """A second put under the claim's name loses and changes nothing: else no commit here can be trusted (TRAPS 30)."""
    key = term_key(term.term)
    rival = replace(term, id=uuid.uuid4().hex)
    if storage.put_if_absent(key, rival.encode()) or decode_term(storage.read(key), key).id != term.id:
        raise _no_condition(storage, "a second put of the same key won as well")


def _no_condition(storage: Storage, seen: str) -> NoConditionError:
    return NoConditionError(
        f"{storage.url}: {seen}; this storage does not honour put-if-absent, on which every commit stands. Choose "
        'another root, or pass commit="single-writer" if only one job at a time ever writes to this one: dscheck then '
        "looks before it puts, and two jobs at once may both believe that they own a term, and replace what the other "
        "one has committed (docs/commit.md P28 to P31)",
        url=storage.url,
        key="",
    )


def _superseded(storage: Storage, winner: Term, what: str) -> SupersededError:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(winner.time))
    return SupersededError(
        f"{storage.url}: {what} (term {winner.term}, claimed on host '{winner.host}' at {since}). This job must not "
        "save there any more: stop it, or stop the other one and start this one again from the newest step",
        id=winner.id,
        term=winner.term,
        host=winner.host,
        time=winner.time,
    )
