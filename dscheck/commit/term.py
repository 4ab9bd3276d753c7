"""A term is one job's claim on a root: numbered, put once, and the proof that the root is one and the same for all
ranks.
"""

from __future__ import annotations

import time
import uuid

from dscheck.commit.once import put_once, read_if_there
from dscheck.errors import CheckpointNotFoundError, StorageError, SupersededError
from dscheck.manifest.keys import term_key
from dscheck.manifest.record import Term, decode_term
from dscheck.storage.base import Storage


def claim(
    storage: Storage, *, seen: int, parent: tuple[int, int] | None, run: str | None, host: str, now: float
) -> Term:
    """Claim term `seen` + 1, which continues from `parent` (term, step), or from nothing.

    The claim is also the probe: a second put of it must lose. Raises SupersededError with the winner's term, host and
    time when another job was faster; StorageError when the storage does not honour put-if-absent, or fails.
    """
    identity = uuid.uuid4().hex
    term = Term(seen + 1, identity, run or identity, parent, host, now)
    key = term_key(term.term)
    winner = decode_term(put_once(storage, key, term.encode()), key)
    if winner.id != term.id:
        raise _superseded(storage, winner)
    rival = Term(term.term, uuid.uuid4().hex, term.run, parent, host, now)
    if storage.put_if_absent(key, rival.encode()) or decode_term(storage.read(key), key).id != term.id:
        raise StorageError(
            f"{storage.url}/{key}: a second put of the same key replaced the first; this storage does not honour "
            "put-if-absent, on which every commit stands: choose another root",
            url=storage.url,
            key=key,
        )
    return term


def confirm(storage: Storage, term: int, identity: str) -> None:
    """This rank sees the claim that rank 0 made. Raises StorageError when it does not: its root is another place."""
    key = term_key(term)
    stored = read_if_there(storage, key)
    if stored is None or decode_term(stored, key).id != identity:
        found = "nothing" if stored is None else f"the claim {decode_term(stored, key).id}"
        raise StorageError(
            f"{storage.url}/{key}: rank 0 wrote the claim {identity} there, this rank sees {found}; the root is not "
            f"one "
            "shared place for all ranks (a node's own disk?): choose a root that all nodes share",
            url=storage.url,
            key=key,
        )


def assert_newest(storage: Storage, term: Term) -> None:
    """No newer term exists. Raises SupersededError with the newer one's term, host and time."""
    key = term_key(term.term + 1)
    stored = read_if_there(storage, key)
    if stored is not None:
        raise _superseded(storage, decode_term(stored, key))


def _superseded(storage: Storage, winner: Term) -> SupersededError:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(winner.time))
    return SupersededError(
        f"{storage.url}: a job on host '{winner.host}' claimed term {winner.term} at {since}, which is newer than "
        f"what this "
        "job knows; this job must not save there any more: stop it, or the other one",
        term=winner.term,
        host=winner.host,
        time=winner.time,
    )


def read_term(storage: Storage, number: int) -> Term:
    """The claim of one term. Raises CorruptCheckpointError, or CheckpointNotFoundError for a term that should be
    there.
    """
    key = term_key(number)
    stored = read_if_there(storage, key)
    if stored is None:
        raise CheckpointNotFoundError(f"{storage.url}/{key}: other objects name this term, but it is gone", key=key)
    return decode_term(stored, key)
