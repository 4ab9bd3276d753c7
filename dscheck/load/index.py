"""What says where the bytes of a step lie: read once a host, passed on to its ranks, and verified by each of them."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from types import TracebackType

import numpy as np

from dscheck.commit.parts import Direct, Part
from dscheck.load.mail import Letters, Mailbox, Message
from dscheck.load.wire import Wire
from dscheck.ranks.message import pack, unpack
from dscheck.storage.base import Storage

PHASE = "load (index)"


class HostIndex:
    """Parts of the index for one rank: the ranks of its host read each part once together. `with` it.

    A rank that leaves it by an error tells the others of its host, who would wait for it. `received`: bytes that others
    have read for this rank. Construction is collective over all ranks; raises what `Wire.gather` does.
    """

    def __init__(self, storage: Storage, wire: Wire | None, deadline: float) -> None:
        """Without a `wire`, and on a host of one rank, each reads for itself."""
        self._direct, self._deadline = Direct(storage), deadline
        self._box: Mailbox | None = None
        self._letters: dict[int, Letters] = {}
        self._rank = 0 if wire is None else wire.rank
        self.received = 0
        if wire is not None:
            self._meet(wire)

    def __enter__(self) -> HostIndex:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._box is not None:
            if error is not None:
                self._box.fail(f"{type(error).__name__}: {error}")
            self._box.close()
        for letters in self._letters.values():
            letters.close()

    def fetch(self, parts: Sequence[Part]) -> Iterator[bytes]:
        """These parts, in order. Every rank of the host calls it, as often as the others, with what it wants itself.

        Raises what reading does, and what `Letters.next` does. Nothing is verified.
        """
        if self._box is None:
            return self._direct(parts)
        self._box.post([_encode(parts)])
        wanted = set[Part]()
        for message in self._next():
            wanted.update(_decode(self._letters[message.sender].read(message.offset, message.nbytes)))
        shares = _shares(sorted(wanted), sorted(self._letters))
        self._box.post(self._direct(shares[self._rank]))
        places = {}
        for message in self._next():
            at = message.offset
            for part in shares[message.sender]:
                places[part] = self._letters[message.sender], at
                at += part.size
        self.received += sum(part.size for part in parts if places[part][0].sender != self._rank)
        return (places[part][0].read(places[part][1], part.size) for part in parts)

    def _next(self) -> list[Message]:
        return [letters.next(self._deadline, PHASE) for letters in self._letters.values()]

    def _meet(self, wire: Wire) -> None:
        """Find the ranks that all see each other."""
        self._box = _open_mailbox()
        try:
            addresses = wire.gather(b"" if self._box is None else self._box.address, self._deadline)
            for rank, address in enumerate(addresses):
                if (letters := Letters.find(rank, address)) is not None:
                    self._letters[rank] = letters
            mine = hashlib.sha256(repr(sorted(self._letters)).encode()).digest()
            seen = wire.gather(mine, self._deadline)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        for rank in [rank for rank in self._letters if seen[rank] != mine]:
            self._letters.pop(rank).close()
        if self._box is not None and len(self._letters) < 2:
            self.__exit__(None, None, None)
            self._box, self._letters = None, {}


def _open_mailbox() -> Mailbox | None:
    try:
        return Mailbox()
    except (OSError, AttributeError):
        return None


def _encode(parts: Sequence[Part]) -> bytes:
    by_key: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for part in parts:
        by_key[part.key].append((part.offset, part.size))
    return pack(by_key)


def _decode(data: bytes) -> Iterator[Part]:
    return (Part(key, *place) for key, places in unpack(data).items() for place in places)


def _shares(parts: Sequence[Part], ranks: Sequence[int]) -> dict[int, list[Part]]:
    """What each rank reads: parts that follow each other, about as many bytes as the others."""
    ends = np.cumsum([0, *(part.size for part in parts)])
    edges = np.searchsorted(ends, ends[-1] * np.arange(1, len(ranks)) // len(ranks)).tolist()
    bounds = [0, *edges, len(parts)]
    return {rank: list(parts[bounds[i] : bounds[i + 1]]) for i, rank in enumerate(ranks)}
