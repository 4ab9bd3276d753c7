"""What `files.arrow` says of each data file: its size, and where its checksums and its rank's objects lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dscheck.errors import LayoutError
from dscheck.manifest.blocks import CODED_BYTES, CRC_BYTES, is_coded
from dscheck.manifest.fields import SHA256
from dscheck.manifest.keys import LARGEST
from dscheck.manifest.place import CHECKSUM_ALIGNMENT, align


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes [offset, offset + size) of a data file and their SHA-256, in lower-case hex."""

    offset: int
    size: int
    sha256: str

    @property
    def end(self) -> int:
        return self.offset + self.size


@dataclass(frozen=True, slots=True)
class FileRow:
    """The data file of `rank`: its blocks, then `checksums` (a BlockTable), `ours`, `mine`."""

    rank: int
    size: int
    blocks: int
    checksums: Extent
    ours: Extent
    mine: Extent

    @property
    def coded(self) -> bool:
        return is_coded(self.checksums.size, self.blocks)


def validate_files(rows: Sequence[FileRow], ends: Sequence[tuple[int, int]] | None = None) -> None:
    """Raises LayoutError unless there is one row a rank, in order, and each file is laid out without a gap or overlap.

    With a plan's `file_ends`, unless the rows also are those of its ranks, with its fragments and blocks. Coded blocks
    are at most as long as raw ones, and nothing lies between them.
    """
    for number, row in enumerate(rows):
        _check_row(number, row)
    if ends is None:
        return
    if len(rows) != len(ends):
        raise LayoutError(f"{len(rows)} data files, the plan has {len(ends)} ranks")
    for row, (end, blocks) in zip(rows, ends, strict=True):
        limit = align(end, CHECKSUM_ALIGNMENT)
        fits = row.checksums.offset <= limit if row.coded else row.checksums.offset == limit
        if row.blocks != blocks or not fits:
            raise LayoutError(
                f"data file {row.rank} has {row.blocks} blocks with checksums at {row.checksums.offset}; "
                f"by the plan {blocks} at {limit}" + (" or before" if row.coded else "")
            )


def _check_row(number: int, row: FileRow) -> None:
    if row.rank != number:
        raise LayoutError(f"row {number} of the data files is of rank {row.rank}")
    parts = (row.checksums, row.ours, row.mine)
    if not all(SHA256.fullmatch(part.sha256) for part in parts):
        raise LayoutError(f"data file {number} has a digest that is not 64 hex digits")
    numbers = (row.size, row.blocks, *(part.offset for part in parts), *(part.size for part in parts))
    if min(numbers) < 0 or max(numbers) > LARGEST:
        raise LayoutError(f"data file {number} has sizes outside 0 to 2**63: {numbers}")
    if row.checksums.offset % CHECKSUM_ALIGNMENT or row.checksums.size not in (
        row.blocks * CRC_BYTES,
        row.blocks * CODED_BYTES,
    ):
        raise LayoutError(
            f"data file {number} has {row.blocks} blocks and {row.checksums.size} bytes of checksums at "
            f"{row.checksums.offset}"
        )
    if (row.ours.offset, row.mine.offset, row.size) != (row.checksums.end, row.ours.end, row.mine.end):
        raise LayoutError(f"data file {number} of {row.size} bytes has a gap or an overlap behind its checksums")
