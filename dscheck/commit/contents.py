"""One committed step as it is read back: record, plan, files and objects, each proved before it is used (C5, C15)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dscheck.commit.parts import Direct, Fetch, Part
from dscheck.commit.stored import ADVICE, StoredPlan, proved
from dscheck.errors import CorruptCheckpointError, IncompleteCoverError, LayoutError
from dscheck.layout.cover import prove_cover
from dscheck.manifest.arrow import decode_files, refusing
from dscheck.manifest.blocks import BlockTable
from dscheck.manifest.files import Extent, FileRow, validate_files
from dscheck.manifest.keys import data_key, files_key
from dscheck.manifest.objects import decode_objects
from dscheck.manifest.plan import Plan
from dscheck.manifest.record import CODED, Record
from dscheck.storage.base import Storage

Options = dict[str, dict[str, Any]]
"""Optimizer → parameter → tagged options."""


def gaps(plan: Plan) -> Iterator[IncompleteCoverError]:
    """What is wrong with each tensor whose fragments do not tile it exactly once."""
    for number in plan.untiled():
        row = plan.tensors[number]
        try:
            prove_cover(row.name, row.shape, [fragment.region for fragment in plan.fragments_of(number)])
        except IncompleteCoverError as error:
            yield error


def _check_requirement(record: Record, files: Sequence[FileRow]) -> None:
    """Raises LayoutError unless the record says of its data files whether one is coded."""
    coded = any(file.coded for file in files)
    if coded != (CODED in record.requires):
        required = ", ".join(record.requires) or "nothing"
        raise LayoutError(f"data files with{'' if coded else 'out'} a codec, and a record that requires {required}")


@dataclass(frozen=True, slots=True)
class Contents:
    """What one committed step says of itself; the plan's head and the files have matched the record's digests and each
    other.
    """

    storage: Storage
    record: Record
    plan: StoredPlan
    files: tuple[FileRow, ...]
    fetch: Fetch

    @classmethod
    def open(cls, storage: Storage, record: Record, fetch: Fetch | None = None) -> Contents:
        """Two reads. Raises CorruptCheckpointError, or CheckpointNotFoundError for an object that is gone.

        `fetch` brings all that several ranks may want, one call each: the plan's head, the table of files, what
        `plan.overlapping`, `ours` and `checksums` need; the storage itself does without it.
        """
        fetch = fetch or Direct(storage)
        plan = StoredPlan(storage, record.term, record.plan, fetch)
        files_name = files_key(record.step, record.term)
        (data,) = proved(storage.url, [(Part(files_name, 0, record.files.size), record.files.sha256)], fetch)
        files = decode_files(data, files_name)
        try:
            validate_files(files, plan.head.file_ends)
            _check_requirement(record, files)
        except LayoutError as error:
            lost = next((str(gap) for gap in gaps(plan.whole())), "")
            raise CorruptCheckpointError(
                f"{storage.url}/{files_name}: {lost or error}; {ADVICE}", key=files_name
            ) from error
        return cls(storage, record, plan, tuple(files), fetch)

    @property
    def head_bytes(self) -> int:
        """What every rank reads to know where anything lies: the plan's head, and the table of files."""
        return self.record.plan.size + self.record.files.size

    def key(self, rank: int) -> str:
        """The data file of one saved rank."""
        return data_key(self.record.step, self.record.term, rank)

    def mine(self, rank: int) -> Mapping[str, Any]:
        """The objects that belong to one saved rank alone, tagged."""
        (data,) = self._extents([(rank, self.files[rank].mine)], Direct(self.storage))
        return decode_objects(data, self.key(rank))[0]

    def ours(self, ranks: Sequence[int]) -> dict[int, tuple[dict[str, Any], Options]]:
        """The objects and optimizer options of these saved ranks, tagged."""
        texts = self._extents([(rank, self.files[rank].ours) for rank in ranks], self.fetch)
        return {rank: decode_objects(text, self.key(rank)) for rank, text in zip(ranks, texts, strict=True)}

    def checksums(self, ranks: Sequence[int]) -> dict[int, BlockTable]:
        """What the data files of these ranks say of their blocks. Raises CorruptCheckpointError."""
        found = self._extents([(rank, self.files[rank].checksums) for rank in ranks], self.fetch)
        return {rank: self._blocks(self.files[rank], data) for rank, data in zip(ranks, found, strict=True)}

    def _blocks(self, file: FileRow, data: bytes) -> BlockTable:
        with refusing(self.key(file.rank)):
            return BlockTable.decode(data, file.blocks, file.checksums.offset, self.plan.block_bytes)

    def _extents(self, extents: Sequence[tuple[int, Extent]], fetch: Fetch) -> Iterator[bytes]:
        parts = [(Part(self.key(rank), extent.offset, extent.size), extent.sha256) for rank, extent in extents]
        return proved(self.storage.url, parts, fetch)
