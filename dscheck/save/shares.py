"""Which boxes a rank captures under what was last agreed, and which regions it samples; reused until either changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from dscheck.layout.region import Region
from dscheck.manifest.dtypes import ITEMSIZE
from dscheck.save.claims import Exceptions, share_of, watch
from dscheck.save.holdings import Held, Holdings
from dscheck.snapshot import CapturePlan, Source

PlanMaker = Callable[[Sequence[torch.Tensor], Sequence[Source], Sequence[tuple[int, torch.Tensor]]], CapturePlan]
"""Of live tensors, the boxes to capture and the regions to sample: Capturer.plan."""


@dataclass(frozen=True, slots=True, eq=False)
class Agreed:
    """What the last plan told this rank. `contested` are the regions whose samples it sends."""

    plan: str = ""
    exceptions: Exceptions = field(default_factory=dict)
    contested: frozenset[tuple[str, Region]] = frozenset()


@dataclass(frozen=True, slots=True)
class Box:
    """What one rank writes as one fragment: `region`, all or a part of what it holds as `held`."""

    held: Held
    region: Region

    @property
    def key(self) -> tuple[str, Region]:
        return self.held.claim.name, self.region

    @property
    def nbytes(self) -> int:
        return self.region.numel * ITEMSIZE[self.held.claim.dtype]

    def __str__(self) -> str:
        return f"{self.held.claim.name} {self.region}"


def boxes_of(holdings: Holdings, rank: int, exceptions: Exceptions) -> tuple[Box, ...]:
    """What `rank` writes, in the order of its data file."""
    boxes = [Box(item, box) for item in holdings.held for box in share_of(rank, item.claim, item.region, exceptions)]
    return tuple(sorted(boxes, key=lambda box: (box.held.claim.name.encode(), box.region)))


@dataclass(frozen=True, slots=True, eq=False)
class Shares:
    """The boxes that this rank captures, in file order, and the plan by which it does, for every save like this one.

    `sources`: the box's number in the plan by its key. `watched`: the regions whose samples the coordinator wants: all
    held ones as long as it does not know the claims (`full`).
    """

    holdings: Holdings
    agreed: Agreed
    full: bool
    boxes: tuple[Box, ...]
    sources: Mapping[tuple[str, Region], int]
    watched: tuple[tuple[str, Region], ...]
    plan: CapturePlan

    def serves(self, holdings: Holdings, agreed: Agreed, full: bool) -> bool:
        return self.holdings is holdings and self.agreed is agreed and self.full == full

    @classmethod
    def of(
        cls,
        holdings: Holdings,
        agreed: Agreed,
        full: bool,
        locals: Sequence[torch.Tensor],
        make: PlanMaker,
        ranks: tuple[int, int],
        last: Shares | None = None,
    ) -> Shares:
        """`ranks`: this one and how many there are. `last`: its plan is taken over where it would be the same.

        Raises ConfigError for a budget under which no plan can work.
        """
        rank, size = ranks
        boxes = boxes_of(holdings, rank, agreed.exceptions)
        watched = tuple(watch(rank, size, holdings.claims, None if full else agreed.contested))
        if last is not None and last.holdings is holdings and (last.boxes, last.watched) == (boxes, watched):
            return cls(holdings, agreed, full, boxes, last.sources, watched, last.plan)
        regions = {item.key: item for item in holdings.held}
        plan = make(
            locals,
            [Source(str(box), box.held.index, box.held.view_of(box.region, locals), box.held.owner) for box in boxes],
            [(regions[key].index, regions[key].view(locals)) for key in watched],
        )
        return cls(holdings, agreed, full, boxes, {box.key: i for i, box in enumerate(boxes)}, watched, plan)
