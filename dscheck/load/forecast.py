"""What a load would read, before there is anything to load into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dscheck.commit.contents import Contents
from dscheck.layout.region import Region
from dscheck.load.blocks import stored_bytes
from dscheck.load.needs import needs_of
from dscheck.load.reads import reads_of


@dataclass(frozen=True, slots=True)
class Forecast:
    """Of one rank: bytes of tensors that it wants, bytes that it reads for them (blocks, checksums and the plan), from
    how many data files, and in how many reads of tensors.
    """

    wanted_bytes: int
    read_bytes: int
    files: int
    reads: int


def forecast(contents: Contents, wanted: Sequence[tuple[int, Region]]) -> Forecast:
    """What a rank reads that loads these regions of these tensors, by itself. Reads the plan, of coded
    files what they say of their blocks, and no data.

    Raises IncompleteCoverError when the step does not hold them.
    """
    plan = contents.plan
    before = plan.bytes_read
    needs = needs_of(plan, [(tensor, region, None) for tensor, region in wanted])
    index = contents.head_bytes + plan.bytes_read - before
    reads = reads_of(needs)
    writers = np.unique(reads.file).tolist()
    checksums = sum(contents.files[writer].checksums.size for writer in writers)
    tables = contents.checksums([writer for writer in writers if contents.files[writer].coded])
    return Forecast(
        needs.nbytes,
        index + checksums + stored_bytes(reads, tables),
        len(writers),
        len(reads),
    )
