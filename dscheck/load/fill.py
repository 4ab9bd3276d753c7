"""All bytes that one rank wants, in live tensors: what others want too is read by one rank and passed on in rounds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dscheck.commit.contents import Contents
from dscheck.config import Settings
from dscheck.load.needs import Need, Read, reads_of
from dscheck.load.passing import Passing
from dscheck.load.place import mark_written
from dscheck.load.read import Checksums, Reader, Task
from dscheck.load.share import Shared, decode, divided, encode, schedule, wanted
from dscheck.load.wire import Wire
from dscheck.manifest.dtypes import ITEMSIZE
from dscheck.storage.base import Storage

WHOLE_ELEMENTS = max(ITEMSIZE.values())
"""Blocks of a multiple of this end with an element, whatever the dtype."""

Agree = Callable[[int], None]
"""Called before each round with its number: returns when every rank has what it is to send, or raises."""


@dataclass(frozen=True, slots=True)
class Split:
    """What one rank reads for itself, its needs of each range that it shares, and how many `rounds` all ranks have."""

    private: list[Need]
    parts: dict[Shared, tuple[Need, ...]]
    rounds: int
    passing: Passing | None


def split(contents: Contents, needs: Sequence[Need], wire: Wire | None, deadline: float) -> Split:
    """Agree with all ranks on who reads what. Collective, where there is a wire."""
    block_bytes = contents.plan.block_bytes
    if wire is None or block_bytes % WHOLE_ELEMENTS:
        return Split(list(needs), {}, 0, None)
    on_device = all(need.target.view.device.type != "cpu" for need in needs)
    posts = wire.gather(bytes([on_device]) + encode(wanted(needs, block_bytes)), deadline)
    shared = schedule([decode(post[1:]) for post in posts])
    mine = [one for one in shared if wire.rank in one.members]
    private, parts = divided(needs, [one.range for one in mine], block_bytes)
    rounds = max((one.round for one in shared), default=-1) + 1
    passing = Passing(wire, shared, all(post[0] for post in posts), deadline) if rounds else None
    return Split(private, {one: tuple(parts[one.range]) for one in mine}, rounds, passing)


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
        ours = [one for one in split.parts if wire is not None and one.reader == wire.rank]
        shared = [Task(self._read_of(one, split), kept=True) for one in ours]
        private = [Task(read) for read in reads_of(split.private, self._contents.plan.block_bytes)]
        tasks = _mixed(shared, private)
        numbers = {id(task): number for number, task in enumerate(tasks)}
        self.read = sum(task.read.stop - task.read.start for task in tasks)
        self.once = sum(one.range.nbytes for one in ours)
        self.once += sum(need.box.numel * ITEMSIZE[need.row.dtype] for need in split.private)
        own = {one: numbers[id(task)] for one, task in zip(ours, shared, strict=True)}
        try:
            with Reader(
                self._storage, self._contents, self._checksums, tasks, self._settings, self._deadline
            ) as reader:
                finished = reader.finished()
                if split.passing is not None:
                    self._pass_on(reader, finished, split, own, split.passing, agree)
                for _ in finished:
                    raise AssertionError("a read was kept for a round that there was not")
        finally:
            mark_written(need for needs in (split.private, *split.parts.values()) for need in needs)

    def _pass_on(
        self,
        reader: Reader,
        finished: Iterator[int],
        split: Split,
        own: dict[Shared, int],
        passing: Passing,
        agree: Agree,
    ) -> None:
        """Round by round: have what this rank reads, agree, exchange, place."""
        by_round: dict[int, list[Shared]] = defaultdict(list)
        for one in split.parts:
            by_round[one.round].append(one)
        there: set[int] = set()
        for number in range(split.rounds):
            sent = [one for one in by_round[number] if one in own]
            for one in sent:
                while own[one] not in there:
                    there.add(next(finished))
                passing.offer(one, reader.bytes(own[one]))
            agree(number)
            for one, data in passing.exchange([one for one in by_round[number] if one not in own]):
                reader.place(self._read_of(one, split), data)
                self.received += one.range.nbytes
            for one in sent:
                reader.release(own[one])

    def _read_of(self, one: Shared, split: Split) -> Read:
        return Read(one.range.file, one.range.start, one.range.stop, split.parts[one])


def _mixed(first: Sequence[Task], second: Sequence[Task]) -> list[Task]:
    """Both in their own order, evenly: neither the disk nor the other ranks wait for all of the other kind."""
    places = [
        ((i + 0.5) / len(tasks), kind, i) for kind, tasks in enumerate((first, second)) for i in range(len(tasks))
    ]
    return [(first, second)[kind][i] for _, kind, i in sorted(places)]
