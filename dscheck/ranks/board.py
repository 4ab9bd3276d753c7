"""What an exchange needs of the medium between ranks: a few keys that all of them see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class BoardLostError(Exception):
    """The board is gone, and with it the rank that hosts it. The text says how that was seen."""


class BoardTimeoutError(Exception):
    """The board neither answered nor failed in time: its host hangs, or the network swallows packets."""


class Board(Protocol):
    """Keys and bytes that all ranks share. Every method may be called from several threads at once.

    `until` is on time.monotonic(). No method returns later than a short grace after it: one that would raises
    BoardTimeoutError. When the host is gone every method raises BoardLostError.
    """

    def put(self, key: str, value: bytes, until: float) -> None:
        """Set `key`; the board is known to hold it when this returns. Wakes all who wait for it."""

    def put_once(self, key: str, value: bytes, until: float) -> bytes:
        """Set `key` unless it is set, in one step that no other rank can split; the value that stands afterwards."""

    def add(self, key: str, until: float) -> int:
        """Count `key` up by one, atomically, from 0 when it is new; the new count."""

    def wait(self, key: str, until: float) -> bytes | None:
        """The value of `key` as soon as it is set; None when it is not by `until`."""

    def look(self, key: str, until: float) -> bytes | None:
        """The value of `key` now; None when it is not set."""

    def read(self, keys: Sequence[str], until: float) -> list[bytes] | None:
        """The values of `keys` in their order; None when one of them is not set."""

    def absent(self, keys: Sequence[str], until: float) -> list[str]:
        """Those of `keys` that are not set, in their order."""

    def delete(self, keys: Sequence[str], until: float) -> None:
        """Remove `keys` and all they hold; one that is not set is no error."""

    def close(self) -> None:
        """Let go; on the hosting rank the board ends for everybody. Idempotent; never raises."""
