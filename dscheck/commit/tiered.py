"""The history of a root that lies in two tiers: the union of both, where each step counts in the tiers that hold it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dscheck.commit.history import History, read_history
from dscheck.commit.listing import StepRef, list_records, list_terms
from dscheck.commit.once import read_if_there
from dscheck.commit.term import read_term
from dscheck.commit.transfer import copy_claims
from dscheck.errors import CheckpointNotFoundError, CorruptCheckpointError, StorageError, SupersededError
from dscheck.manifest.keys import parse_deletion_key, parse_record_key, term_key
from dscheck.manifest.record import decode_term
from dscheck.manifest.text import unseal
from dscheck.storage.base import Entry, ObjectWriter, Storage

log = logging.getLogger("dscheck")

UNREADABLE = b"unreadable"
"""What a rank sends that cannot read its node's part."""


@dataclass(frozen=True, slots=True)
class Node:
    """What one node's part of a near tier holds: its records by name, the highest claim there, and that claim's id."""

    names: frozenset[StepRef]
    newest_term: int
    claim_id: str | None

    @classmethod
    def look(cls, near: Storage) -> Node:
        """Raises what reading a damaged root raises."""
        names, newest = list_records(near).steps, list_terms(near)
        return cls(names, newest, read_term(near, newest).id if newest else None)

    def encode(self) -> bytes:
        """For another rank: some bytes a record."""
        body = [sorted((ref.step, ref.term) for ref in self.names), self.newest_term, self.claim_id]
        return json.dumps(body, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, data: bytes) -> Node:
        """Raises StorageError for what a rank sends that could not look."""
        if data == UNREADABLE:
            raise StorageError("a rank cannot read it: see its warning")
        names, newest_term, claim_id = json.loads(data)
        return cls(frozenset(StepRef(*ref) for ref in names), newest_term, claim_id)


class TwoTiers:
    """`near` and `shared` as one, to read whole small objects from; of the near records only `counted` are there."""

    def __init__(self, near: Storage, shared: Storage, counted: frozenset[StepRef]) -> None:
        self._near, self._shared, self._counted = near, shared, counted

    @property
    def url(self) -> str:
        return f"{self._near.url} and {self._shared.url}"

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        near = read_if_there(self._near, key) if self._counts(key) else None
        if near is None:
            return self._shared.read(key, offset, length)
        try:
            unseal(near, key)
        except CorruptCheckpointError as error:
            shared = read_if_there(self._shared, key)
            if shared is not None:
                log.warning("%s is damaged, and taken from %s: %s", self._near.url, self._shared.url, error)
                return shared
        return near

    def list(self, prefix: str) -> Iterator[Entry]:
        near = {entry.key: entry for entry in self._near.list(prefix) if self._counts(entry.key)}
        shared = {entry.key: entry for entry in self._shared.list(prefix) if not self._kept_near(entry.key)}
        yield from (shared | near).values()

    def _counts(self, key: str) -> bool:
        """Whether a near object is part of the whole: what was deleted near may still lie in the shared tier."""
        numbers = parse_record_key(key)
        if numbers is None:
            return parse_deletion_key(key) is None
        return StepRef(*numbers) in self._counted

    def _kept_near(self, key: str) -> bool:
        """Whether this says that a step was deleted in the shared tier which the near one still has."""
        numbers = parse_deletion_key(key)
        return numbers is not None and StepRef(*numbers) in self._counted


class Nearest:
    """`near`, where what it lacks is read from `shared`: on a node's own disk lie the files of its own ranks.

    Whatever is read is proved by whoever asks for it, from wherever it comes.
    """

    def __init__(self, near: Storage, shared: Storage) -> None:
        self._near, self._shared = near, shared

    @property
    def url(self) -> str:
        return self._near.url

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return self._near.put_if_absent(key, data)

    def create(self, key: str) -> ObjectWriter:
        return self._near.create(key)

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        try:
            return self._near.read(key, offset, length)
        except CheckpointNotFoundError:
            return self._shared.read(key, offset, length)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        try:
            self._near.read_into(key, offset, buffer)
        except CheckpointNotFoundError:
            self._shared.read_into(key, offset, buffer)

    def list(self, prefix: str) -> Iterator[Entry]:
        return self._near.list(prefix)

    def delete(self, key: str) -> None:
        self._near.delete(key)


def held_by_all(nodes: Sequence[Node]) -> frozenset[StepRef]:
    """The steps that count in a near tier: those whose record every node holds."""
    return frozenset.intersection(*(node.names for node in nodes)) if nodes else frozenset()


def read_tiers(near: Storage, shared: Storage, nodes: Sequence[Node]) -> tuple[History, frozenset[StepRef]]:
    """The history of both tiers, and which of its steps count in the near one.

    Raises SupersededError when a node's claims are not those of the shared tier: they hold different histories.
    """
    for node in nodes:
        _assert_same_run(near, shared, node)
    counted = held_by_all(nodes)
    return read_history(TwoTiers(near, shared, counted)), counted


def waiting(history: History, counted: frozenset[StepRef], shared: Storage, limit: int) -> list[StepRef]:
    """The steps of the live history, up to `limit`, that only the near tier has, ascending: those still to be uploaded.

    Uploads keep the order of steps, so what is older than the newest one up there was uploaded, and deleted again.
    """
    names = list_records(shared)
    above = names.taken | names.deleted
    newest = max((ref.step for ref in history.visible if ref in above), default=-1)
    return [ref for ref in history.visible if ref in counted and ref not in above and newest < ref.step <= limit]


def level_claims(source: Storage, destination: Storage) -> None:
    """Both hold the claims that `source` has. Raises SupersededError for a different claim of the same number."""
    copy_claims(source, destination, range(list_terms(destination) + 1, list_terms(source) + 1))


def _assert_same_run(near: Storage, shared: Storage, node: Node) -> None:
    """The node's newest claim, or where it is ahead the one of that number, is that of the shared tier.

    One claim tells for all before it: they were copied in order, and each was compared (P32).
    """
    if not node.newest_term:
        return
    stored = read_if_there(shared, term_key(node.newest_term))
    if stored is None:
        newest = min(list_terms(near), list_terms(shared))
        copy_claims(near, shared, range(newest, newest + 1) if newest else range(0))
        return
    claim = decode_term(stored, term_key(node.newest_term))
    if claim.id != node.claim_id:
        raise SupersededError(
            f"{near.url}: term {node.newest_term} of this near tier is the claim {node.claim_id}, and {shared.url} has "
            f"another one, claimed on host '{claim.host}'; they hold different histories: choose a near tier that is "
            "empty, or that belongs to this run",
            id=claim.id,
            term=claim.term,
            host=claim.host,
            time=claim.time,
        )
