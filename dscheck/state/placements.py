"""How live tensors are cut over ranks: a DTensor by its mesh, a hand-made shard by its box or range, the rest whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Replicate as TorchReplicate
from torch.distributed.tensor import Shard as TorchShard
from torch.distributed.tensor.placement_types import _StridedShard as TorchStridedShard

from dscheck.errors import StateError
from dscheck.layout.flat import flat_range_boxes
from dscheck.layout.placement import Placement, Replicate, Shard, StridedShard, local_pieces, local_shape
from dscheck.layout.region import Region
from dscheck.state.tensors import is_wrapper, plain, refuse_unstorable


@dataclass(frozen=True, slots=True)
class Part:
    """One region of a global tensor and the live memory that holds it: an alias, and `view.shape == region.shape`."""

    region: Region
    view: torch.Tensor


class Proof(Enum):
    """Why the holders of a tensor hold the same bytes (invariant C14)."""

    MESH = "mesh"  # a DTensor's device mesh, or DDP's process group: shares of it may be written by different ranks
    CLAIM = "claim"  # nothing but the name: one rank writes it whole, after equal samples
    FIRST = "first"  # one rank is authoritative (buffers under DDP): the others only load it


Box = Region | tuple[int, int]
"""Where a piece lies in the local tensor: a box of it, or a range of it once flattened."""


@dataclass(frozen=True, slots=True)
class Cut:
    """What one rank holds of a global tensor of `shape`, and where it lies in its local tensor of `local_shape`.

    `pieces` are the non-empty ones, in local order. `holders`: the global ranks, sorted, that provably hold the same
    pieces (this rank alone under Proof.CLAIM; under Proof.FIRST the one rank whose bytes count, perhaps another).
    `group` holds any of the tensor: a number that belongs to it (an optimizer's step) is the same on all of those.
    """

    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    pieces: tuple[tuple[Region, Box], ...]
    holders: tuple[int, ...]
    group: tuple[int, ...]
    proof: Proof

    @property
    def is_whole(self) -> bool:
        """Whether this rank holds the whole tensor as it is."""
        return self.local_shape == self.shape and all(region.shape == self.shape for region, _ in self.pieces)

    def parts(self, local: torch.Tensor) -> tuple[Part, ...]:
        """The pieces with their views of `local`, detached, which keep the old bytes after `p.data = other`."""
        local = plain(local.detach())
        return tuple(Part(region, _view(local, region, box)) for region, box in self.pieces)

    def whole_of(self, shape: Sequence[int]) -> Cut:
        """A whole tensor of another shape on the same ranks."""
        return _whole(tuple(shape), self.holders, self.group, self.proof)

    def scalar(self) -> Cut:
        """The 0-d companion of the tensor: one number, the same on every rank that holds any part."""
        return _whole((), self.group, self.group, self.proof)


def _view(local: torch.Tensor, region: Region, box: Box) -> torch.Tensor:
    if isinstance(box, Region):
        return local if box.shape == tuple(local.shape) else local[box.slices()]
    return local.view(-1)[box[0] : box[1]].view(region.shape)


def whole(shape: Sequence[int], rank: int) -> Cut:
    """A tensor that nothing but its name connects to other ranks."""
    return _whole(tuple(shape), (rank,), (rank,), Proof.CLAIM)


@lru_cache(maxsize=4096)
def _whole(shape: tuple[int, ...], holders: tuple[int, ...], group: tuple[int, ...], proof: Proof) -> Cut:
    region = Region.whole(shape)
    return Cut(shape, shape, ((region, region),) if region.numel else (), holders, group, proof)


def replicated(shape: Sequence[int], ranks: Sequence[int], proof: Proof) -> Cut:
    """A whole tensor that all `ranks` hold (MESH), or whose bytes `ranks[0]` decides (FIRST)."""
    holders = tuple(sorted(ranks)) if proof is Proof.MESH else (ranks[0],)
    return _whole(tuple(shape), holders, holders, proof)


def box(shape: Sequence[int], offset: Sequence[int], local_shape: Sequence[int], rank: int) -> Cut:
    """A hand-made box of a global tensor that starts at `offset`."""
    here = Region.whole(tuple(local_shape))
    pieces = ((here.shift(offset), here),) if here.numel else ()
    return Cut(tuple(shape), here.stop, pieces, (rank,), (rank,), Proof.CLAIM)


def flat_range(shape: Sequence[int], start: int, stop: int, local_shape: Sequence[int], rank: int) -> Cut:
    """A hand-made range of the flattened global tensor, cut into boxes."""
    pieces, at = [], 0
    for region in flat_range_boxes(tuple(shape), start, stop):
        pieces.append((region, (at, at + region.numel)))
        at += region.numel
    return Cut(tuple(shape), tuple(local_shape), tuple(pieces), (rank,), (rank,), Proof.CLAIM)


def cut_of(tensor: torch.Tensor, path: str, rank: int) -> Cut:
    """The cut of a tensor about which nothing but itself is known. Raises StateError for what cannot be stored."""
    if not is_wrapper(tensor):
        refuse_unstorable(tensor, path)  # before its shape is asked for: not all of those have one
    return dtensor_cut(tensor, path) if isinstance(tensor, DTensor) else whole(tensor.shape, rank)


def dtensor_cut(tensor: DTensor, path: str) -> Cut:
    """The cut of a DTensor by its mesh and placements; a rank outside the mesh holds nothing.

    Raises StateError, naming `path`, for placements that are no layout of stored bytes, and when the local tensor has
    another shape than the placements say.
    """
    spec = tensor._spec
    _refuse_other_orders(spec, path)
    placements = tuple(_placement(placement, path) for placement in spec.placements)
    coordinate = spec.mesh.get_coordinate()
    cut = _mesh_cut(tuple(tensor.shape), spec.mesh, placements, None if coordinate is None else tuple(coordinate))
    real = tuple(tensor._local_tensor.shape)
    if not cut.pieces and not tensor._local_tensor.numel():
        return replace(cut, local_shape=real)  # torch gives empty shards several shapes
    if real != cut.local_shape:
        raise StateError(
            f"tensor '{path}' of shape {list(tensor.shape)} with placements {spec.placements} on mesh "
            f"{list(spec.mesh.shape)}: this rank should hold {list(cut.local_shape)} and holds {list(real)}: it was "
            "cut in another way than torch.chunk does: declare its pieces with dscheck.sharded(...)",
            path=path,
        )
    return cut


def stacked(tensor: DTensor, cut: Cut, shape: Sequence[int]) -> Cut:
    """The cut of what each shard of `tensor`, cut as `cut`, has for itself, of `shape`: one row of it a shard."""
    spec, count, row = tensor._spec, 1, 0
    coordinate = spec.mesh.get_coordinate()
    for dim, placement in enumerate(spec.placements):
        if not placement.is_replicate():
            size = spec.mesh.size(dim)
            count, row = count * size, row * size + (coordinate[dim] if coordinate is not None else 0)
    region = Region((row, *(0 for _ in shape)), (row + 1, *shape))
    pieces: tuple[tuple[Region, Box], ...] = ((region, (0, region.numel)),) if region.numel and cut.pieces else ()
    return Cut((count, *shape), tuple(shape), pieces, cut.holders, cut.group, cut.proof)


def _placement(placement: Any, path: str) -> Placement:
    kind = type(placement)  # not isinstance: a strided shard has been a subclass of Shard, and is cut in another order
    if kind is TorchReplicate:
        return Replicate()
    if kind is TorchShard:
        return Shard(placement.dim)
    if kind is TorchStridedShard:
        return StridedShard(placement.dim, placement.split_factor)
    hint = (
        "redistribute it"
        if placement.is_partial()
        else "redistribute it, or declare its pieces with dscheck.sharded(...)"
    )
    raise StateError(
        f"tensor '{path}' has placement {placement}, which is no layout of stored bytes: {hint}", path=path
    )


def _refuse_other_orders(spec: Any, path: str) -> None:
    """torch 2.13 can cut in an order that the placements alone do not tell."""
    order = getattr(spec, "shard_order", None)
    if order is None or getattr(spec, "use_strided_shard_as_shard_order", False):
        return
    if order != type(spec).compute_default_shard_order(spec.placements):
        raise StateError(
            f"tensor '{path}' is cut in the order {order}, which its placements {spec.placements} do not tell: "
            "redistribute it in the default order",
            path=path,
        )


@lru_cache(maxsize=4096)
def _mesh_cut(
    shape: tuple[int, ...], mesh: Any, placements: tuple[Placement, ...], coordinate: tuple[int, ...] | None
) -> Cut:
    group = tuple(sorted(mesh.mesh.flatten().tolist()))
    if coordinate is None:
        return Cut(shape, (), (), (), group, Proof.MESH)
    mesh_shape = tuple(mesh.shape)
    pieces = local_pieces(shape, mesh_shape, placements, coordinate)
    same = tuple(
        slice(None) if isinstance(placement, Replicate) else index
        for placement, index in zip(placements, coordinate, strict=True)
    )
    holders = tuple(sorted(mesh.mesh[same].flatten().tolist()))
    local = local_shape(shape, mesh_shape, placements, coordinate)
    return Cut(shape, local, pieces, holders, group, Proof.MESH)
