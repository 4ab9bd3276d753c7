"""One round after the other, what one rank has read gets to the ranks that want it too, by the shortest way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from dscheck.load.near import Neighbours, open_arena
from dscheck.load.share import Shared
from dscheck.load.wire import Arrival, Wire
from dscheck.manifest.place import SMALL_ALIGNMENT, align


class Passing:
    """The rounds of one load on one rank: `offer` all that this rank has read for a round, then, when all ranks have
    done so, `exchange`.

    Ranks of one host read each other's memory; the process group serves all others, and all of them where everything is
    to lie on accelerators. Construction is collective; raises what `Wire.gather` does.
    """

    def __init__(self, wire: Wire, schedule: Sequence[Shared], on_device: bool, deadline: float) -> None:
        """`schedule` and `on_device` are the same on all ranks."""
        self._wire, self._on_device, self._deadline = wire, on_device, deadline
        self._sends: list[tuple[int, torch.Tensor]] = []
        self._offsets, round_bytes = _offsets(schedule)
        self._arena = None if on_device else open_arena(round_bytes)
        try:
            addresses = wire.gather(b"" if self._arena is None else self._arena.address, deadline, on_device)
            self._near = Neighbours(addresses, round_bytes, wire.rank)
            seen = wire.gather(bytes(rank in self._near.ranks for rank in range(len(addresses))), deadline)
        finally:
            if self._arena is not None:
                self._arena.hide()
        self._readers = frozenset(rank for rank, sees in enumerate(seen) if sees[wire.rank])

    def offer(self, one: Shared, data: torch.Tensor) -> None:
        """`data` (bytes on the host) stays as it is until the next `exchange` is over."""
        others = [member for member in one.members if member != self._wire.rank]
        if self._arena is not None and not self._readers.isdisjoint(others):
            self._arena.put(one.round, self._offsets[one], data)
        self._sends += [(member, data) for member in others if member not in self._readers]

    def exchange(self, wanted: Sequence[Shared]) -> Iterator[tuple[Shared, torch.Tensor]]:
        """What this rank wants of one round; the bytes last until all have agreed on the next one."""
        far = [one for one in wanted if one.reader not in self._near.ranks]
        arrivals = [Arrival(one.reader, one.range.nbytes) for one in far]
        sends, self._sends = self._sends, []
        yield from zip(far, self._wire.swap(sends, arrivals, self._on_device, self._deadline), strict=True)
        for one in wanted:
            if one.reader in self._near.ranks:
                yield one, self._near.get(one.reader, one.round, self._offsets[one], one.range.nbytes)


def _offsets(schedule: Sequence[Shared]) -> tuple[dict[Shared, int], int]:
    """Where each range lies in what its reader passes on in its round, and the most that one passes on in a round."""
    ends: Counter[tuple[int, int]] = Counter()
    offsets = {}
    for one in schedule:
        offsets[one] = ends[one.reader, one.round]
        ends[one.reader, one.round] += align(one.range.nbytes, SMALL_ALIGNMENT)
    return offsets, max(ends.values(), default=0)
