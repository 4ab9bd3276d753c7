"""How many bytes of a storage reads take: fewer than they serve where blocks are compressed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dscheck.load.reads import Reads
from dscheck.manifest.blocks import BlockTable


def stored_bytes(reads: Reads, tables: Mapping[int, BlockTable]) -> int:
    """Of all reads; a file that has no table here is a plain one."""
    nbytes = reads.stop - reads.start
    coded = {file: table.stored for file, table in tables.items() if table.stored is not None}
    if not coded or not len(reads):
        return int(nbytes.sum())
    first, last = reads.needs.blocks()
    # From the first block to the last that it needs; the columns are one longer, as the end of a range may be theirs.
    ranges = np.stack([reads.begin, reads.end], axis=1).ravel()
    first = np.minimum.reduceat(np.append(first, 0), ranges)[::2]
    last = np.maximum.reduceat(np.append(last, 0), ranges)[::2]
    for file, stored in coded.items():
        rows = np.flatnonzero(reads.file == file)
        nbytes[rows] = stored.starts[last[rows]] - stored.starts[first[rows]]
    return int(nbytes.sum())
