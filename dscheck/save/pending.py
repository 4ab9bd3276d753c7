"""Rank 0's part of the uploads: which steps wait in the near tier, and who of the ranks takes which file."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from dscheck.commit import StepRef
from dscheck.commit.history import History
from dscheck.commit.listing import list_terms
from dscheck.commit.term import refuse_newer
from dscheck.commit.tiered import Node, read_tiers, waiting
from dscheck.commit.transfer import copy_claims
from dscheck.ranks.message import pack, unpack
from dscheck.storage import Tiers
from dscheck.storage.base import Storage


class Pending:
    """The steps still to be uploaded, by what the two tiers show at the begin of a turn, in the order of steps."""

    def __init__(self, tiers: Tiers, shared: Storage) -> None:
        self._tiers, self._shared = tiers, shared
        self._ours: set[StepRef] = set()
        self._lost: set[StepRef] = set()
        self._queue: deque[StepRef] = deque()
        self._history: History | None = None

    def begin(self, posts: Sequence[bytes], limit: int) -> bytes:
        """The first step up to `limit` to upload, if there is one, and `firsts`: the first rank of each node.

        Raises SupersededError when the step just saved is on a branch that a newer job's claim in the shared tier has
        abandoned: this one must stop.
        """
        told = [unpack(post) for post in posts]
        nodes = [Node.decode(post["near"].encode()) for post in told if post["near"] is not None]
        near = nodes or [Node.look(self._tiers.near)]
        self._history, counted = read_tiers(self._tiers.near, self._shared, near)
        saved = told[0]["saved"]
        ref = max((ref for ref in counted if ref.step == saved), key=lambda ref: ref.term, default=None)
        if ref is not None:
            self._ours.add(ref)
            if ref not in self._history.visible:
                refuse_newer(self._shared, ref.term)
        self._queue = deque(
            ref for ref in waiting(self._history, counted, self._shared, limit) if ref not in self._lost
        )
        nodes_of = [post["node"] for post in told]
        firsts = sorted({nodes_of.index(node) for node in nodes_of})
        return pack(unpack(self._answer(None)) | {"firsts": firsts})

    def done(self, ref: StepRef, lost: str | None) -> bytes:
        """The next step after `ref`, which was uploaded, or is `lost` since the near tier no longer has it whole."""
        if lost is not None:
            self._lost.add(ref)
        return self._answer(lost)

    def _answer(self, lost: str | None) -> bytes:
        answer: dict[str, Any] = {"lost": lost, "record": None}
        if self._queue:
            assert self._history is not None
            ref = self._queue.popleft()
            # Nothing is below a root before its claims are: a shared tier may be newer than the near one.
            copy_claims(self._tiers.near, self._shared, range(list_terms(self._shared) + 1, ref.term + 1))
            record = self._history.record(ref).encode().decode()
            answer |= {"record": record, "step": ref.step, "term": ref.term, "own": ref in self._ours}
        return pack(answer)


def assign(posts: Sequence[bytes], files: int) -> bytes:
    """Which rank uploads which of so many files, in turns of those that find it; `missing`: what nobody finds."""
    held = [set(unpack(post)) for post in posts]
    taken: list[list[int]] = [[] for _ in posts]
    missing = []
    for file in range(files):
        holders = [rank for rank, found in enumerate(held) if file in found]
        if holders:
            taken[min(holders, key=lambda rank: (len(taken[rank]), rank))].append(file)
        else:
            missing.append(file)
    return pack({"files": taken, "missing": missing})
