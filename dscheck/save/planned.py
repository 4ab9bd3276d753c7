"""What rank 0 keeps of a plan once it is encoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dscheck.layout.region import Region
from dscheck.manifest.arrow import EncodedPlan, encode_plan
from dscheck.manifest.record import Counts
from dscheck.save.merge import Merged
from dscheck.save.rivals import Rivals


@dataclass(frozen=True, slots=True)
class Planned:
    """What is asked of a plan at every save. Its columns, some 80 bytes a fragment, are let go.

    `file_ends` as in Plan; `exceptions` and `rivals` as in Merged.
    """

    encoded: EncodedPlan
    counts: Counts
    file_ends: Sequence[tuple[int, int]]
    exceptions: Mapping[tuple[str, Region], tuple[int, ...]]
    rivals: Rivals

    @classmethod
    def of(cls, merged: Merged) -> Planned:
        """Raises LayoutError for a plan that would not be read again."""
        plan = merged.plan
        ends = plan.file_ends()
        counts = Counts(
            tensors=len(plan.tensors),
            fragments=len(plan.fragments),
            ranks=len(plan.ranks),
            blocks=sum(blocks for _, blocks in ends),
            bytes=int(plan.fragments.nbytes.sum()),
        )
        return cls(encode_plan(plan), counts, ends, merged.exceptions, merged.rivals)
