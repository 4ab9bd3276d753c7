"""A plan as it lies in the storage: its head is read when it is opened, fragments batch by batch when asked for."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from dscheck.commit.parts import Direct, Fetch, Part
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


def proved(url: str, parts: Sequence[tuple[Part, str]], fetch: Fetch) -> Iterator[bytes]:
    """The bytes of parts, each with its SHA-256, once they are proved; fetched at the call.

    Raises CorruptCheckpointError.
    """
    return _proved(url, parts, fetch([part for part, _ in parts]))


def _proved(url: str, parts: Sequence[tuple[Part, str]], fetched: Iterator[bytes]) -> Iterator[bytes]:
    for (part, sha256), data in zip(parts, fetched, strict=True):
        found = hashlib.sha256(data).hexdigest()
        if found != sha256 or len(data) != part.size:
            raise CorruptCheckpointError(
                f"{url}/{part.key}: SHA-256 {sha256} stored, {found} computed from {len(data)} bytes at "
                f"{part.offset}; {ADVICE}",
                key=part.key,
                offset=part.offset,
            )
        yield data


class StoredPlan:
    """What a rank needs of a plan, each part proved by its digest before it is decoded.

    Not for several threads.
    """

    def __init__(self, storage: Storage, term: int, digest: Digest, fetch: Fetch | None = None) -> None:
        """One read. Raises CorruptCheckpointError, or CheckpointNotFoundError for an object that is gone.

        `fetch` brings the head, and what `overlapping` needs; the storage itself does without it.
        """
        self.key = plan_key(term, digest.sha256)
        self._url, self._behind, self._direct = storage.url, digest.size, Direct(storage)
        self._sha256 = digest.sha256
        self._fetch = fetch or self._direct
        (data,) = proved(self._url, [(Part(self.key, 0, digest.size), digest.sha256)], self._fetch)
        self.head: Head = decode_head(data, self.key)
        self._rules = BatchRules(self.head)

    @property
    def bytes_read(self) -> int:
        """Of the head and the batches, without what `fetch` has brought."""
        return self._direct.nbytes

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
        for batch, rows in self._read(list(asking), self._fetch):
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

    def raw(self) -> bytes:
        """The object as it is stored, head and batches proved by their digests."""
        directory = self.head.directory
        head = (Part(self.key, 0, self._behind), self._sha256)
        batches = [
            (Part(self.key, self._behind + offset, size), sha256.hex())
            for offset, size, sha256 in zip(
                directory.offset.tolist(), directory.size.tolist(), directory.sha256, strict=True
            )
        ]
        return b"".join(proved(self._url, [head, *batches], self._direct))

    def whole(self) -> Plan:
        """All of it in memory, some 80 bytes a fragment, with every rule checked."""
        rows = Fragments.joined([rows for _, rows in self._read(range(len(self.head.directory)), self._direct)])
        plan = Plan(self.tensors, rows, self.ranks, self.holders, self.block_bytes)
        with refusing(self.key):
            plan.validate()
            if tuple(plan.file_ends()) != self.head.file_ends:
                raise LayoutError("the fragments do not end where the ranks say that their data files do")
        return plan

    def _checked(self, batches: Sequence[int]) -> Iterator[Fragments]:
        for number, rows in self._read(batches, self._direct):
            with refusing(f"{self.key} batch {number}"):
                self._rules.check_batch(number, rows)
            yield rows

    def _read(self, batches: Sequence[int], fetch: Fetch) -> Iterator[tuple[int, Fragments]]:
        """These batches, ascending."""
        directory = self.head.directory
        places = zip(directory.offset[batches].tolist(), directory.size[batches].tolist(), batches, strict=True)
        parts = [
            (Part(self.key, self._behind + offset, size), directory.sha256[number].hex())
            for offset, size, number in places
        ]
        for number, data in zip(batches, proved(self._url, parts, fetch), strict=True):
            yield number, decode_batch(data, number, self.head, self._rules, self.key)
