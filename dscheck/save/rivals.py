"""Regions that ranks claim without a proof that they are replicas: compared by samples at every save (C14)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dscheck.config import Replicas
from dscheck.errors import StateError
from dscheck.layout.boxes import Ints
from dscheck.layout.region import Region

ADVICE = (
    "Wrap what belongs to one rank in dscheck.per_rank(...), declare shards of one tensor with dscheck.sharded(...), "
    'or set replicas="first" to store the lowest rank\'s'
)


@dataclass(frozen=True, slots=True)
class Samples:
    """Hashes of what one rank sampled; `rows`, ascending, are the regions among those that it claims."""

    rows: Ints
    hashes: NDArray[np.uint64]


@dataclass(slots=True)
class Rivals:
    """`regions` are contested by tensor name and box, in order. Claim i is of region of[i], by rank[i], who claims it
    as its region row[i].
    """

    regions: list[tuple[str, Region]] = field(default_factory=list)
    _ranks: list[Ints] = field(default_factory=list)
    _rows: list[Ints] = field(default_factory=list)

    def add(self, key: tuple[str, Region], ranks: Ints, rows: Ints) -> None:
        """`ranks`, ascending, claim the region, each as its row."""
        self.regions.append(key)
        self._ranks.append(ranks)
        self._rows.append(rows)

    def rows_by_rank(self, ranks: int) -> list[Ints]:
        """Of each rank, the rows of its claims that are contested, ascending."""
        if not self.regions:
            return [np.empty(0, np.int64)] * ranks
        rank, row = np.concatenate(self._ranks), np.concatenate(self._rows)
        order = np.lexsort((row, rank))
        return np.split(row[order], np.searchsorted(rank[order], np.arange(1, ranks)))

    def agree(self, samples: Callable[[], Sequence[Samples]], replicas: Replicas) -> bool:
        """Refuse ranks that claim one region and differ in its samples (invariant C14).

        `samples`, of each rank, are asked for only where something is contested. False when some that are needed were
        not sent, because the plan changed on another rank alone.
        """
        if replicas == "first" or not self.regions:
            return True
        known = samples()
        rank, row = np.concatenate(self._ranks), np.concatenate(self._rows)
        begin = np.cumsum([0, *map(len, self._ranks)])
        sent, hashes = np.zeros(len(rank), np.bool_), np.zeros(len(rank), np.uint64)
        for number in np.unique(rank).tolist():
            mine, watched = np.flatnonzero(rank == number), known[number].rows
            at = np.searchsorted(watched, row[mine])
            found = at < len(watched)
            found[found] = watched[at[found]] == row[mine][found]
            sent[mine[found]], hashes[mine[found]] = True, known[number].hashes[at[found]]
        wrong = ~sent | (hashes != np.repeat(hashes[begin[:-1]], np.diff(begin)))
        if not wrong.any():
            return True
        first = int(np.searchsorted(begin, np.argmax(wrong), side="right")) - 1
        claims = slice(int(begin[first]), int(begin[first + 1]))
        if not sent[claims].all():
            return False
        name, region = self.regions[first]
        one, other = int(rank[claims][0]), int(rank[claims][np.argmax(wrong[claims])])
        raise StateError(
            f"tensor '{name}' {region}: ranks {one} and {other} hold different values under one name. {ADVICE}",
            path=name,
            ranks=[one, other],
        )
