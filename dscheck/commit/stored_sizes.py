"""What a codec made of the fragments of a step: how each is stored, in how many bytes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dscheck.commit.contents import Contents
from dscheck.layout.boxes import Ints
from dscheck.manifest.fragments import Fragments
from dscheck.manifest.place import block_count


class StoredSizes:
    """Of all data files of a step. Reads what the coded ones say of their blocks."""

    def __init__(self, contents: Contents) -> None:
        self._block_bytes = contents.plan.block_bytes
        coded = [file.rank for file in contents.files if file.coded]
        self._tables = {rank: table.stored for rank, table in contents.checksums(coded).items()}

    def of(self, fragments: Fragments) -> tuple[Ints, NDArray[np.uint8]]:
        """The stored bytes of each fragment, and the highest Codec of its blocks: one that does not shrink is raw."""
        nbytes, codecs = fragments.nbytes.copy(), np.zeros(len(fragments), np.uint8)
        counts = block_count(fragments.nbytes, self._block_bytes)
        for rank, stored in self._tables.items():
            rows = np.flatnonzero(fragments.writer == rank)
            if stored is None or not len(rows):
                continue
            first = fragments.first_block[rows]
            last = first + counts[rows]
            nbytes[rows] = stored.starts[last] - stored.starts[first]
            ranges = np.stack([first, last], axis=1).ravel()
            codecs[rows] = np.maximum.reduceat(np.append(stored.codecs, np.uint8(0)), ranges)[::2]
        return nbytes, codecs
