"""Parts of objects, and how they are read: those that lie near each other at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from dscheck.storage.base import Storage

READ_BYTES = 8 << 20
GAP_BYTES = 64 << 10
"""Parts are read together up to the first, where no more than the second lies between them unread."""


class Part(NamedTuple):
    """`size` bytes of the object `key` from `offset` on."""

    key: str
    offset: int
    size: int

    @property
    def end(self) -> int:
        return self.offset + self.size


Fetch = Callable[[Sequence[Part]], Iterator[bytes]]
"""Gives the bytes of parts, in order, unverified; raises what reading raises."""


class Direct:
    """A Fetch that reads a storage; `nbytes` adds up what it has read."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.nbytes = 0

    def __call__(self, parts: Sequence[Part]) -> Iterator[bytes]:
        at = 0
        while at < len(parts):
            first, end = parts[at], at + 1
            while end < len(parts) and _near(first, parts[end - 1], parts[end]):
                end += 1
            data = self._storage.read(first.key, first.offset, parts[end - 1].end - first.offset)
            self.nbytes += len(data)
            for part in parts[at:end]:
                yield data[part.offset - first.offset : part.end - first.offset]
            at = end


def _near(first: Part, last: Part, part: Part) -> bool:
    """Whether one read may bring all from `first` to `last` and `part` too."""
    follows = part.key == first.key and last.end <= part.offset <= last.end + GAP_BYTES
    return follows and part.end <= first.offset + READ_BYTES
