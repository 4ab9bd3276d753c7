"""A plan as it lies in the storage: its head is read when it is opened, fragments batch by batch when asked for."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from dscheck.errors import CorruptCheckpointError, LayoutError
from dscheck.layout.boxes import Ints, joined
from dscheck.layout.region import Region
from dscheck.manifest.arrow import decode_batch, decode_head, refusing
from dscheck.manifest.fragments import Fragments
from dscheck.manifest.head import BatchRules, Head
from dscheck.manifest.keys import plan_key
from dscheck.manifest.plan import Plan, RankRow, TensorRow
from dscheck.manifest.record import Digest
from dscheck.storage.base import Storage

ADVICE = "the object is damaged: load an earlier step, or run `dscheck verify`"

READ_BYTES = 8 << 20
GAP_BYTES = 64 << 10
"""Batches are read together up to the first, where no more than the second lies between them unread."""


def read_digested(storage: Storage, key: str, offset: int, size: int, sha256: str) -> bytes:
    """`size` bytes of `key` from `offset` on, proved by their SHA-256. Raises CorruptCheckpointError."""
    data = storage.read(key, offset, size)
    compare_digest(storage, key, offset, data, sha256)
    return data


def compare_digest(storage: Storage, key: str, offset: int, data: bytes, sha256: str) -> None:
    """Raises CorruptCheckpointError unless `data`, read from `offset` of `key`, has this SHA-256."""
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise CorruptCheckpointError(
            f"{storage.url}/{key}: SHA-256 {sha256} stored, {found} computed from {len(data)} bytes at {offset}; "
            f"{ADVICE}",
            key=key,
            offset=offset,
        )


class StoredPlan:
    """What a rank needs of a plan, each part proved by its digest before it is decoded.

    `bytes_read` counts the head and the batches. Not for several threads.
    """

    def __init__(self, storage: Storage, term: int, digest: Digest) -> None:
        """One read. Raises CorruptCheckpointError, or CheckpointNotFoundError for an object that is gone."""
        self.key = plan_key(term, digest.sha256)
        self._storage, self._behind = storage, digest.size
        data = read_digested(storage, self.key, 0, digest.size, digest.sha256)
        self.head: Head = decode_head(data, self.key)
        self.bytes_read = digest.size
        self._rules = BatchRules(self.head)

    @property
    def tensors(self) -> tuple[TensorRow, ...]:
        return self.head.tensors

    @property
    def ranks(self) -> tuple[RankRow, ...]:
        return self.head.ranks

    @property
    def holders(self) -> tuple[tuple[int, ...], ...]:
        return self.head.holders

    @property
    def block_bytes(self) -> int:
        return self.head.block_bytes

    @property
    def size(self) -> int:
        """Bytes of the whole object."""
        return self._behind + self.head.directory.nbytes

    def index(self) -> dict[str, int]:
        """The tensor's index by every name that it has."""
        return {name: i for i, tensor in enumerate(self.tensors) for name in tensor.names}

    def overlapping(self, wanted: Sequence[tuple[int, Region]]) -> tuple[Fragments, Ints]:
        """As of a plan in memory. Reads the batches that may hold some, each once. Raises CorruptCheckpointError."""
        asked, want = self.head.directory.find_each(wanted)
        asking: dict[int, list[int]] = defaultdict(list)
        for batch, number in zip(asked.tolist(), want.tolist(), strict=True):
            asking[batch].append(number)
        parts: list[Fragments] = []
        numbers: list[Ints] = []
        for batch, rows in self._read(list(asking)):
            for number in asking[batch]:
                found = rows.overlapping(*wanted[number])
                parts.append(rows.take(found))
                numbers.append(np.full(len(found), number))
        want = joined(numbers, np.int64)
        order = np.argsort(want, kind="stable")
        rows = Fragments.joined(parts).take(order)
        with refusing(self.key):
            self._rules.check_rows(rows)
        return rows, want[order]

    def fragments_of(self, tensor: int) -> Fragments:
        """All fragments of one tensor, by start."""
        parts = []
        for rows in self._checked(self.head.directory.find(tensor)):
            begin, end = rows.rows_of(tensor)
            parts.append(rows[begin:end])
        return Fragments.joined(parts)

    def batches(self) -> Iterator[Fragments]:
        """All fragments, some at a time, none of which is kept."""
        return self._checked(range(len(self.head.directory)))

    def whole(self) -> Plan:
        """All of it in memory, some 80 bytes a fragment, with every rule checked."""
        rows = Fragments.joined([rows for _, rows in self._read(range(len(self.head.directory)))])
        plan = Plan(self.tensors, rows, self.ranks, self.holders, self.block_bytes)
        with refusing(self.key):
            plan.validate()
            if tuple(plan.file_ends()) != self.head.file_ends:
                raise LayoutError("the fragments do not end where the ranks say that their data files do")
        return plan

    def _checked(self, batches: Sequence[int]) -> Iterator[Fragments]:
        for number, rows in self._read(batches):
            with refusing(f"{self.key} batch {number}"):
                self._rules.check_batch(number, rows)
            yield rows

    def _read(self, batches: Sequence[int]) -> Iterator[tuple[int, Fragments]]:
        """These batches, ascending, those that lie near each other in one read."""
        directory, at = self.head.directory, 0
        offset = directory.offset[batches].tolist()
        ends = (directory.offset + directory.size)[batches].tolist()
        while at < len(batches):
            begin, end = offset[at], at + 1
            while end < len(batches) and offset[end] <= ends[end - 1] + GAP_BYTES and ends[end] <= begin + READ_BYTES:
                end += 1
            data = self._storage.read(self.key, self._behind + begin, ends[end - 1] - begin)
            self.bytes_read += len(data)
            for number, first, last in zip(batches[at:end], offset[at:end], ends[at:end], strict=True):
                place, part = self._behind + first, data[first - begin : last - begin]
                sha256 = directory.sha256[number].hex()
                compare_digest(self._storage, self.key, place, part, sha256)
                yield number, decode_batch(part, number, self.head, self._rules, self.key)
            at = end
