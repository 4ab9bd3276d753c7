"""All bytes that one rank wants, in live tensors: what others want too is read by one rank and passed on in rounds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from dscheck.commit.contents import Contents
from dscheck.config import Settings
from dscheck.layout.boxes import Ints
from dscheck.load.blocks import stored_bytes
from dscheck.load.needs import Needs
from dscheck.load.passing import Passing
from dscheck.load.place import mark_written
from dscheck.load.read import Checksums, Reader
from dscheck.load.reads import Reads, reads_of
from dscheck.load.share import Shared, decode, divided, encode, schedule, table_of, wanted
from dscheck.load.wire import Wire
from dscheck.manifest.dtypes import ITEMSIZE
from dscheck.storage.base import Storage

WHOLE_ELEMENTS = max(ITEMSIZE.values())
"""Blocks of a multiple of this end with an element, whatever the dtype."""

Agree = Callable[[int], None]
"""Called before each round with its number: returns when every rank has what it is to send, or raises."""


@dataclass(frozen=True, slots=True)
class Split:
    """What one rank reads for itself, what it shares, each range with the read that places it here, and how many
    `rounds` all ranks have.
    """

    private: Needs
    shared: tuple[Shared, ...]
    reads: Reads
    rounds: int
    passing: Passing | None


def split(contents: Contents, needs: Needs, wire: Wire | None, deadline: float) -> Split:
    """Agree with all ranks on who reads what. Collective, where there is a wire."""
    if wire is None or contents.plan.block_bytes % WHOLE_ELEMENTS:
        return Split(needs, (), divided(needs, table_of([]))[1], 0, None)
    on_device = all(target.view.device.type != "cpu" for target in needs.targets)
    posts = wire.gather(bytes([on_device]) + encode(wanted(needs)), deadline)
    shared = schedule([decode(post[1:]) for post in posts])
    mine = tuple(one for one in shared if wire.rank in one.members)
    private, reads = divided(needs, table_of([one.range for one in mine]))
    rounds = max((one.round for one in shared), default=-1) + 1
    passing = Passing(wire, shared, all(post[0] for post in posts), deadline) if rounds else None
    return Split(private, mine, reads, rounds, passing)


class Filling:
    """One load of one rank's tensors: `run` it, and then see what it took, in bytes.

    `read`: from storage; `received`: from other ranks; `once`: what this rank answers for of what all ranks want,
    counted once.
    """

    def __init__(
        self, storage: Storage, contents: Contents, checksums: Checksums, settings: Settings, deadline: float
    ) -> None:
        self._storage, self._contents, self._checksums = storage, contents, checksums
        self._settings, self._deadline = settings, deadline
        self.read = self.received = self.once = 0

    def run(self, split: Split, wire: Wire | None, agree: Agree) -> None:
        """Read, pass on and place. Raises the first error, or DeadlineError; nothing is placed after it returned."""
        ours = [at for at, one in enumerate(split.shared) if wire is not None and one.reader == wire.rank]
        shared, private = split.reads.take(np.array(ours, np.int64)), reads_of(split.private)
        order = _mixed(len(ours), len(private))
        reads, kept = Reads.joined(shared, private).take(order), order < len(ours)
        self.read, self.once = stored_bytes(reads, self._checksums), shared.nbytes + split.private.nbytes
        own = dict(zip(ours, np.argsort(order)[: len(ours)].tolist(), strict=True))
        try:
            with Reader(
                self._storage, self._contents, self._checksums, reads, kept, self._settings, self._deadline
            ) as reader:
                finished = reader.finished()
                if split.passing is not None:
                    self._pass_on(reader, finished, split, own, split.passing, agree)
                for _ in finished:
                    raise AssertionError("a read was kept for a round that there was not")
        finally:
            mark_written([*split.private.targets, *split.reads.needs.targets])

    def _pass_on(
        self,
        reader: Reader,
        finished: Iterator[int],
        split: Split,
        own: dict[int, int],
        passing: Passing,
        agree: Agree,
    ) -> None:
        """Round by round: have what this rank reads, agree, exchange, place."""
        by_round: dict[int, list[int]] = defaultdict(list)
        for at, one in enumerate(split.shared):
            by_round[one.round].append(at)
        there: set[int] = set()
        for number in range(split.rounds):
            sent = [at for at in by_round[number] if at in own]
            for at in sent:
                while own[at] not in there:
                    there.add(next(finished))
                passing.offer(split.shared[at], reader.bytes(own[at]))
            agree(number)
            others = [at for at in by_round[number] if at not in own]
            numbers = {split.shared[at]: at for at in others}
            for one, data in passing.exchange(list(numbers)):
                reader.place(split.reads[numbers[one]], data)
                self.received += one.range.nbytes
            for at in sent:
                reader.release(own[at])


def _mixed(first: int, second: int) -> Ints:
    """Tasks of two kinds, numbered one kind after the other, each in its own order and evenly: neither the disk nor
    the other ranks wait for all of the other kind.
    """
    places = [(np.arange(count) + 0.5) / max(1, count) for count in (first, second)]
    return np.argsort(np.concatenate(places), kind="stable")
