"""What depends on the structure of a state alone, made once and kept until it changes: claims, and regions held."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dscheck.layout.region import Region
from dscheck.save.claims import Claim, RankClaims
from dscheck.state.leaf import FlatState, TensorLeaf


@dataclass(frozen=True, slots=True)
class Held:
    """One region that this rank holds: part `part` of what lies in `FlatState.locals[index]`."""

    claim: Claim
    region: Region
    leaf: TensorLeaf
    index: int
    part: int

    @property
    def key(self) -> tuple[str, Region]:
        return self.claim.name, self.region

    @property
    def owner(self) -> Any:
        """The optimizer behind whose fence it may be captured, or None."""
        return self.leaf.owner

    def view(self, locals: Sequence[torch.Tensor]) -> torch.Tensor:
        """The live memory of the region; no autograd."""
        return self.leaf.cut.parts(locals[self.index].detach())[self.part].view

    def view_of(self, box: Region, locals: Sequence[torch.Tensor]) -> torch.Tensor:
        """The live memory of a box of the region."""
        view = self.view(locals)
        return view if box == self.region else view[box.relative_to(self.region.start).slices()]


@dataclass(frozen=True, slots=True, eq=False)
class Holdings:
    """The claims of this rank, their text and its digest, and every region that it holds, sorted by name.

    Valid as long as the state's `tensors` is this very list: the state says by it that nothing changed but values.
    """

    tensors: list[TensorLeaf]
    claims: tuple[Claim, ...]
    text: bytes
    digest: str
    held: tuple[Held, ...]

    @classmethod
    def of(cls, flat: FlatState, rank: int, host: str) -> Holdings:
        claims, held = [], []
        for index, leaf in sorted(enumerate(flat.tensors), key=lambda item: item[1].name.encode()):
            regions = tuple(region for region, _ in leaf.cut.pieces)
            holders = leaf.cut.holders
            claim = Claim(leaf.name, leaf.dtype, leaf.cut.shape, regions, holders, leaf.cut.proof.value, leaf.aliases)
            claims.append(claim)
            if rank in holders:
                held += [Held(claim, region, leaf, index, part) for part, region in enumerate(regions)]
        text = RankClaims.of(host, flat.mesh, claims).encode()
        return cls(flat.tensors, tuple(claims), text, hashlib.sha256(text).hexdigest(), tuple(held))

    def owners(self) -> list[Any]:
        """The optimizers that fence something held, each once."""
        return list({id(item.owner): item.owner for item in self.held if item.owner is not None}.values())
