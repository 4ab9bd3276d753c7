"""Messages between the ranks of one host: each appends its own to a file in memory, and all others read them there."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterable
from typing import NamedTuple

from dscheck.errors import DeadlineError, RankFailureError
from dscheck.load.memory import NONCE_BYTES, Address, new_memory, open_memory

_HEAD = struct.Struct("<qq")
"""Before each message, and written after it: what it is, and its bytes."""

_NONE, _SENT, _FAILED = 0, 1, 2

SHORTEST_S, LONGEST_S = 0.0001, 0.005
"""How long to look away from a message that is not there yet."""


class NeighbourFailedError(RankFailureError):
    """A rank of this host failed, and tells all ranks why in their next agreement."""


class NeighbourLateError(DeadlineError):
    """A rank of this host said nothing in time: the next agreement says whether it is there at all."""


class Message(NamedTuple):
    """Bytes of rank `sender`, at `offset` of its file."""

    sender: int
    offset: int
    nbytes: int


class Mailbox:
    """The messages of this rank. They stay until all who have found it have closed it."""

    def __init__(self) -> None:
        """Raises OSError, or AttributeError, where the system has no such memory."""
        self._fd, self.address = new_memory("dscheck-mail")
        self._end = NONCE_BYTES

    def post(self, parts: Iterable[bytes]) -> None:
        """Append one message. Raises OSError when there is no memory for it."""
        self._append(_SENT, parts)

    def fail(self, reason: str) -> None:
        """Append a last one: nothing will follow."""
        self._append(_FAILED, [reason.encode(errors="replace")])

    def close(self) -> None:
        os.close(self._fd)

    def _append(self, kind: int, parts: Iterable[bytes]) -> None:
        begin = end = self._end + _HEAD.size
        for part in parts:
            while part:
                count = os.pwrite(self._fd, part, end)
                end, part = end + count, part[count:]
        os.pwrite(self._fd, _HEAD.pack(kind, end - begin), self._end)
        self._end = end


class Letters:
    """The messages of rank `sender`, of this host or this rank itself, in their order."""

    def __init__(self, sender: int, fd: int) -> None:
        self.sender, self._fd, self._next = sender, fd, NONCE_BYTES

    @classmethod
    def find(cls, sender: int, address: Address) -> Letters | None:
        """None where this rank cannot read them."""
        fd = open_memory(address)
        return None if fd is None else cls(sender, fd)

    def next(self, deadline: float, phase: str) -> Message:
        """The next message, when it is complete.

        Raises NeighbourFailedError when the sender said that it failed, or NeighbourLateError on time.monotonic().
        """
        pause_s = SHORTEST_S
        while (head := self._head())[0] == _NONE:
            if time.monotonic() > deadline:
                raise self._late(phase)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_S)
        kind, nbytes = head
        message = Message(self.sender, self._next + _HEAD.size, nbytes)
        if kind == _FAILED:
            reason = self.read(message.offset, nbytes).decode()
            raise NeighbourFailedError(
                f"{phase}: rank {self.sender}, of this host, failed: {reason}",
                ranks=(self.sender,),
                phase=phase,
                messages=(reason,),
            )
        self._next = message.offset + nbytes
        return message

    def read(self, offset: int, nbytes: int) -> bytes:
        """Bytes of its file that are part of a message."""
        return os.pread(self._fd, nbytes, offset)

    def close(self) -> None:
        os.close(self._fd)

    def _head(self) -> tuple[int, int]:
        head = os.pread(self._fd, _HEAD.size, self._next)
        return _HEAD.unpack(head) if len(head) == _HEAD.size else (_NONE, 0)

    def _late(self, phase: str) -> NeighbourLateError:
        waited_for = f"what rank {self.sender} has to say to the ranks of its host"
        return NeighbourLateError(
            f"{phase}: waited for {waited_for} until the deadline; look at why it is late, or raise timeout_s",
            ranks=(self.sender,),
            phase=phase,
            waited_for=waited_for,
        )
