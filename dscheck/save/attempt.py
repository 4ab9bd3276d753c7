"""One save on one rank: what it holds, captures and writes, from `save()` to the commit."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dscheck.layout.region import Region
from dscheck.manifest.objects import encode_objects
from dscheck.save.claims import Claim, Exceptions, RankClaims, share_of
from dscheck.save.coordinator import Coordinator, watch
from dscheck.save.handle import SaveHandle
from dscheck.save.write import Objects
from dscheck.snapshot import Capture, Fences, Source, bits, sample
from dscheck.state.leaf import FlatState


@dataclass(frozen=True, slots=True)
class Held:
    """One region that this rank holds, and the counts by which a later capture can tell that it did not change."""

    claim: Claim
    region: Region
    view: torch.Tensor
    owner: Any
    steps: int
    version: int | None


@dataclass(frozen=True, slots=True)
class Agreed:
    """What the last plan told this rank. `contested` are the regions whose samples it sends."""

    plan: str = ""
    exceptions: Exceptions = field(default_factory=dict)
    contested: frozenset[tuple[str, Region]] = frozenset()


@dataclass(slots=True)
class Moment:
    """The state as of one `save()`, taken on the training thread: claims, samples, objects, and what to capture."""

    claims: RankClaims
    text: bytes
    digest: str
    held: list[Held]
    objects: Objects
    full: bool
    samples: dict[tuple[str, Region], torch.Tensor]

    @classmethod
    def of(cls, flat: FlatState, rank: int, host: str, fences: Fences, agreed: Agreed, digest: str) -> Moment:
        """`digest` is that of the claims which the coordinator knows; others are sent whole, with all their samples."""
        leaves = sorted(zip(flat.tensors, flat.locals, strict=True), key=lambda pair: pair[0].name.encode())
        rows = []
        held = []
        for leaf, local in leaves:
            cut = leaf.cut
            regions = tuple(region for region, _ in cut.pieces)
            claim = Claim(leaf.name, leaf.dtype, cut.shape, regions, cut.holders, cut.proof.value, leaf.aliases)
            rows.append(claim)
            if rank in cut.holders:
                held += [_held(claim, part.region, part.view, leaf.owner, fences) for part in cut.parts(local)]
        claims = RankClaims(host, flat.mesh, tuple(rows))
        text = claims.encode()
        new = hashlib.sha256(text).hexdigest()
        full = new != digest
        views = {(item.claim.name, item.region): item.view for item in held}
        watched = watch(rank, rows, None if full else set(agreed.contested))
        samples = {key: sample(bits(views[key])) for key in watched}
        objects = Objects(encode_objects(flat.ours, flat.options), encode_objects(flat.mine))
        return cls(claims, text, new, held, objects, full, samples)

    def hashes(self) -> list[int]:
        """One 64-bit hash a sampled region; waits for the device."""
        return [_hash(values.cpu()) for values in self.samples.values()]

    def shares(self, rank: int, exceptions: Exceptions) -> list[tuple[Held, Region]]:
        """The boxes that `rank` writes, in the order of its data file."""
        boxes = [(item, box) for item in self.held for box in share_of(rank, item.claim, item.region, exceptions)]
        return sorted(boxes, key=lambda share: (share[0].claim.name.encode(), share[1]))


def _held(claim: Claim, region: Region, view: torch.Tensor, owner: Any, fences: Fences) -> Held:
    steps = 0 if owner is None else fences.steps(owner)
    return Held(claim, region, view, owner, steps, None if view.is_inference() else view._version)


def _hash(values: torch.Tensor) -> int:
    return int.from_bytes(hashlib.blake2b(values.numpy().tobytes(), digest_size=8).digest(), "little")


def source_of(item: Held, box: Region) -> Source:
    """What to capture for one box of a held region."""
    inner = item.view[box.relative_to(item.region.start).slices()] if item.view.ndim else item.view
    return Source(f"{item.claim.name} {box}", inner, item.owner)


@dataclass(slots=True, eq=False)
class Attempt:
    """One call of `save()` on this rank.

    `number` counts the calls and keys the rounds. `error`: it failed in the call; `told`: and was raised there.
    `coordinator`: of rank 0 at that time.
    """

    number: int
    step: int
    handle: SaveHandle
    moment: Moment | None = None
    capture: Capture | None = None
    captured: dict[tuple[str, Region], int] = field(default_factory=dict)
    coordinator: Coordinator | None = None
    error: Exception | None = None
    told: bool = False
    busy: bool = False
    joined: list[str] = field(default_factory=list)
    exchanging: bool = False
    planned: bool = False

    @property
    def untold(self) -> str | None:
        """The round in which the others wait for this rank and have not heard of it; None when there is none."""
        if not self.joined:
            return "plan"
        return "arrive" if self.planned and self.joined == ["plan"] else None

    def bytes_of(self, item: Held, box: Region) -> torch.Tensor:
        """The captured bytes of one box, captured now if the plan made this rank its writer only after `save()`."""
        assert self.capture is not None
        assert self.moment is not None
        index = self.captured.get((item.claim.name, box))
        if index is not None:
            return self.capture.data(index)
        before = self.moment.samples.get((item.claim.name, item.region), torch.empty(0))
        return self.capture.late(source_of(item, box), item.view, before, item.steps, item.version)

    def fragments(self, shares: Sequence[tuple[Held, Region]]) -> list[torch.Tensor]:
        return [self.bytes_of(item, box) for item, box in shares]
