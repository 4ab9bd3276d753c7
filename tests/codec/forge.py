"""A coded checkpoint of one rank, changed by someone who gets all digests right."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dscheck.manifest.arrow import decode_files, encode_files
from dscheck.manifest.blocks import BlockTable, StoredBlocks
from dscheck.manifest.files import Extent, FileRow
from dscheck.manifest.keys import data_key, files_key, record_key
from dscheck.manifest.record import Digest, Record, decode_record
from dscheck.native import crc32c

BLOCK_BYTES = 16384


@dataclass
class Stored:
    """One stored block. `size` is what the table says, its true one unless changed; so is `crc`."""

    data: bytes
    codec: int
    size: int | None = None
    crc: int | None = None


class Forged:
    """The newest step of `root`, of one rank and one data file: `blocks` of it, and `write` to put them back."""

    def __init__(self, root: Path, step: int = 1, term: int = 1) -> None:
        self.root, self._step, self._term = root, step, term
        self.record = self._record()
        (self.row,) = decode_files((root / files_key(step, term)).read_bytes(), "k")
        data = (root / data_key(step, term, 0)).read_bytes()
        parts = self.row.checksums, self.row.ours, self.row.mine
        checksums, self._ours, self._mine = (data[part.offset : part.end] for part in parts)
        self.table = BlockTable.decode(checksums, self.row.blocks, self.row.checksums.offset, BLOCK_BYTES)
        stored = self.table.stored
        assert stored is not None
        starts = stored.starts.tolist()
        self.blocks = [
            Stored(data[a:b], codec) for a, b, codec in zip(starts, starts[1:], stored.codecs.tolist(), strict=False)
        ]

    def _record(self) -> Record:
        key = record_key(self._step, self._term)
        found = decode_record((self.root / key).read_bytes(), key)
        assert isinstance(found, Record)
        return found

    def write(self, requires: Sequence[str] = ("codec",)) -> None:
        """All objects anew, with sizes and digests that agree."""
        data = b"".join(block.data for block in self.blocks)
        data += bytes(-len(data) % 8)
        crcs = [crc32c(block.data) if block.crc is None else block.crc for block in self.blocks]
        sizes = [len(block.data) if block.size is None else block.size for block in self.blocks]
        codecs = np.array([block.codec for block in self.blocks], np.uint8)
        stored = StoredBlocks.of(np.array(crcs, np.uint32), np.array(sizes, np.uint32), codecs)
        extents = []
        table = BlockTable(self.table.checksums, stored).encode()
        for part in (table, self._ours, self._mine):
            extents.append(Extent(len(data), len(part), hashlib.sha256(part).hexdigest()))
            data += part
        self._put(data_key(self._step, self._term, 0), data)
        files = encode_files([FileRow(0, len(data), self.row.blocks, *extents)])
        self._put(files_key(self._step, self._term), files)
        digest = Digest(len(files), hashlib.sha256(files).hexdigest())
        record = replace(self.record, files=digest, requires=tuple(requires))
        self._put(record_key(self._step, self._term), record.encode())

    def _put(self, key: str, data: bytes) -> None:
        path = self.root / key
        path.unlink()
        path.write_bytes(data)
