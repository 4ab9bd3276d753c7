"""One committed step as it is read back: record, plan, files and objects, each proved before it is used (C5, C15)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dscheck.commit.stored import ADVICE, StoredPlan, read_digested
from dscheck.errors import CorruptCheckpointError, IncompleteCoverError, LayoutError
from dscheck.layout.cover import prove_cover
from dscheck.manifest.arrow import decode_files
from dscheck.manifest.files import Extent, FileRow, validate_files
from dscheck.manifest.keys import data_key, files_key
from dscheck.manifest.objects import decode_objects
from dscheck.manifest.plan import Plan
from dscheck.manifest.record import Record
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


@dataclass(frozen=True, slots=True)
class Contents:
    """What one committed step says of itself; the plan's head and the files have matched the record's digests and each
    other.
    """

    storage: Storage
    record: Record
    plan: StoredPlan
    files: tuple[FileRow, ...]

    @classmethod
    def open(cls, storage: Storage, record: Record) -> Contents:
        """Two reads. Raises CorruptCheckpointError, or CheckpointNotFoundError for an object that is gone."""
        plan = StoredPlan(storage, record.term, record.plan)
        files_name = files_key(record.step, record.term)
        files = decode_files(read_digested(storage, files_name, 0, record.files.size, record.files.sha256), files_name)
        try:
            validate_files(files, plan.head.file_ends)
        except LayoutError as error:
            lost = next((str(gap) for gap in gaps(plan.whole())), "")
            raise CorruptCheckpointError(
                f"{storage.url}/{files_name}: {lost or error}; {ADVICE}", key=files_name
            ) from error
        return cls(storage, record, plan, tuple(files))

    @property
    def head_bytes(self) -> int:
        """What every rank reads to know where anything lies: the plan's head, and the table of files."""
        return self.record.plan.size + self.record.files.size

    def key(self, rank: int) -> str:
        """The data file of one saved rank."""
        return data_key(self.record.step, self.record.term, rank)

    def mine(self, rank: int) -> Mapping[str, Any]:
        """The objects that belong to one saved rank alone, tagged."""
        return self._objects(rank, self.files[rank].mine)[0]

    def ours(self, rank: int) -> tuple[dict[str, Any], Options]:
        """The objects and optimizer options of one saved rank, tagged."""
        return self._objects(rank, self.files[rank].ours)

    def checksums(self, ranks: Iterable[int]) -> dict[int, NDArray[np.uint32]]:
        """The CRC32C of every block in the data files of these ranks, in block order."""
        return {rank: np.frombuffer(self._extent(rank, self.files[rank].checksums), "<u4") for rank in ranks}

    def _objects(self, rank: int, extent: Extent) -> tuple[dict[str, Any], Options]:
        return decode_objects(self._extent(rank, extent), self.key(rank))

    def _extent(self, rank: int, extent: Extent) -> bytes:
        return read_digested(self.storage, self.key(rank), extent.offset, extent.size, extent.sha256)
