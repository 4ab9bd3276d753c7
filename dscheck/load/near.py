"""Ranks of one host pass bytes on through memory that they share: each places them from where one has put them."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

import torch

from dscheck.load.memory import Address, new_memory, open_memory

_HEAD_BYTES = 4096
"""Before the rounds: what proves that a mapping is the one that its owner means."""


class Arena:
    """Memory of one rank that others read. It has room for two rounds, in turn: when all ranks have agreed on a round,
    nobody reads any more what was there two rounds before.
    """

    def __init__(self, round_bytes: int) -> None:
        """Raises OSError where the system gives no such memory."""
        self._round_bytes = round_bytes
        self._fd, self.address = new_memory("dscheck-pass")
        try:
            size = _HEAD_BYTES + 2 * round_bytes
            os.posix_fallocate(self._fd, 0, size)  # now, or its first use would end the process
            self._bytes = torch.frombuffer(mmap.mmap(self._fd, size), dtype=torch.uint8)
        except BaseException:
            os.close(self._fd)
            raise

    def put(self, round: int, offset: int, data: torch.Tensor) -> None:
        """Put bytes of the host at `offset` of what this rank passes on in `round`."""
        start = _HEAD_BYTES + round % 2 * self._round_bytes + offset
        self._bytes[start : start + len(data)].copy_(data)

    def hide(self) -> None:
        """Who has mapped it keeps it, and nobody else finds it any more."""
        os.close(self._fd)


class Neighbours:
    """The arenas of the other ranks of this host."""

    def __init__(self, addresses: Sequence[Address], round_bytes: int, rank: int) -> None:
        self._round_bytes = round_bytes
        self._bytes: dict[int, torch.Tensor] = {}
        for peer, address in enumerate(addresses):
            if peer != rank and (found := _mapped(address, _HEAD_BYTES + 2 * round_bytes)) is not None:
                self._bytes[peer] = found

    @property
    def ranks(self) -> frozenset[int]:
        return frozenset(self._bytes)

    def get(self, rank: int, round: int, offset: int, nbytes: int) -> torch.Tensor:
        """What `rank` has put there, until the round after the next."""
        start = _HEAD_BYTES + round % 2 * self._round_bytes + offset
        return self._bytes[rank][start : start + nbytes]


def open_arena(round_bytes: int) -> Arena | None:
    """None where the system has no such memory: bytes then go another way."""
    try:
        return Arena(round_bytes)
    except (OSError, AttributeError):
        return None


def _mapped(address: Address, size: int) -> torch.Tensor | None:
    """The arena at `address`, or None where this process cannot reach it."""
    fd = open_memory(address)
    if fd is None:
        return None
    try:
        return torch.frombuffer(mmap.mmap(fd, size), dtype=torch.uint8)
    except (OSError, ValueError):
        return None
    finally:
        os.close(fd)
