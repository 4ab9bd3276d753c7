"""Our boxes against what torch really holds: FSDP2 over TP, rank by rank, on a process group that moves no bytes.

`distribute_tensor(src_data_rank=None)` and `fully_shard` only slice the data given on the rank: a tensor filled with
its own flat indices shows, in each rank's local tensor, which elements that rank was given.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch._dynamo  # loaded by the first DTensor: here once, not in the process of each rank
import torch.distributed as dist
from torch import nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor import Placement as TorchPlacement
from torch.distributed.tensor import Replicate as TorchReplicate
from torch.distributed.tensor import Shard as TorchShard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from dscheck.layout.placement import Placement, Replicate, Shard, StridedShard, local_pieces, local_shape
from tests.forkserver import CONTEXT

Array = npt.NDArray[np.float64]
SIZES = (0, 1, 2, 3, 5, 7, 8, 9, 13, 17, 25, 33)


@dataclass(frozen=True)
class Grid:
    """A mesh, and which of its dimensions FSDP2 and tensor parallelism (or experts and tensor parallelism) cut."""

    sizes: tuple[int, ...]
    data: tuple[str, ...]
    tensor: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        return math.prod(self.sizes)


GRIDS = (
    Grid((8,), ("shard",)),
    Grid((4, 2), ("shard",), ("tp",)),
    Grid((3, 2), ("shard",), ("tp",)),
    Grid((2, 3), ("replicate", "shard")),
    Grid((2, 2, 2), ("replicate", "shard"), ("tp",)),
    Grid((3, 2, 2), ("shard",), ("expert", "tp")),
)


@dataclass(frozen=True)
class Held:
    """One parameter on one rank, after torch has cut it, and the box (shape, offset) that torch says it is."""

    shape: tuple[int, ...]
    mesh_shape: tuple[int, ...]
    placements: tuple[Placement, ...]
    coordinate: tuple[int, ...]
    local: Array
    torch_box: tuple[tuple[int, ...], tuple[int, ...]]


def ours(placement: TorchPlacement) -> Placement:
    # _StridedShard first: in some torch versions it is a Shard.
    if isinstance(placement, _StridedShard):
        return StridedShard(placement.dim, int(placement.split_factor))
    return Shard(placement.dim) if isinstance(placement, TorchShard) else Replicate()


def held(tensor: torch.Tensor) -> Held:
    assert isinstance(tensor, DTensor)
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    return Held(
        tuple(tensor.shape),
        tuple(mesh.shape),
        tuple(map(ours, tensor.placements)),
        tuple(coordinate),
        tensor.to_local().detach().numpy(),
        compute_local_shape_and_global_offset(tensor.shape, mesh, tensor.placements),
    )


def counting(shape: Sequence[int]) -> Array:
    return np.arange(math.prod(shape), dtype=np.float64).reshape(tuple(shape))


def bag(tensors: Iterable[torch.Tensor]) -> nn.Module:
    module = nn.Module()
    for number, tensor in enumerate(tensors):
        module.register_parameter(f"p{number}", nn.Parameter(tensor))
    return module


def distributed(grid: Grid, mesh: DeviceMesh, shape: tuple[int, ...], tp: TorchPlacement) -> torch.Tensor:
    """The tensor before FSDP2 sees it: cut by tensor parallelism, below experts cut along the first dimension."""
    full = torch.from_numpy(counting(shape))
    if not grid.tensor:
        return full
    cuts = (*(TorchShard(0) for _ in grid.tensor[1:]), tp)
    return distribute_tensor(full, mesh[grid.tensor], cuts, src_data_rank=None)


def uneven(grid: Grid, mesh: DeviceMesh) -> Iterator[torch.Tensor]:
    for size in SIZES:
        yield distributed(grid, mesh, (size,), TorchShard(0))
        yield distributed(grid, mesh, (size, 3), TorchShard(1))
    for size in SIZES[::3]:
        yield distributed(grid, mesh, (size,), TorchReplicate())
        yield distributed(grid, mesh, (5, size, 2), TorchShard(1))


def shard_rows(grid: Grid, mesh: DeviceMesh) -> nn.Module:
    module = bag(uneven(grid, mesh))
    fsdp.fully_shard(module, mesh=mesh[grid.data])
    return module


def shard_columns(grid: Grid, mesh: DeviceMesh) -> nn.Module:
    """`shard_placement_fn` on the last dimension: FSDP2 asks for even sizes there, tensor parallelism does not."""
    parts = grid.sizes[len(grid.data) - 1]
    tensors = (
        distributed(grid, mesh, shape, tp)
        for size in range(0, 49, 4)
        for shape, tp in (((size,), TorchShard(0)), ((5, size), TorchShard(0)), ((1, size), TorchShard(1)))
    )
    even = [tensor for tensor in tensors if all(size % parts == 0 for size in last_sizes(tensor))]
    assert len(even) > 5
    module = bag(even)
    fsdp.fully_shard(module, mesh=mesh[grid.data], shard_placement_fn=lambda p: TorchShard(p.ndim - 1))
    return module


def last_sizes(tensor: torch.Tensor) -> set[int]:
    """The sizes that the last dimension has on any rank."""
    sizes = {tensor.shape[-1]}
    if isinstance(tensor, DTensor):
        for dim, parts in enumerate(tensor.device_mesh.shape):
            if tensor.placements[dim].is_shard(tensor.ndim - 1):
                sizes = {len(chunk) for size in sizes for chunk in torch.arange(size).chunk(parts)}
    return sizes


def linear_layers(grid: Grid, mesh: DeviceMesh) -> nn.Module:
    """Linear layers through `parallelize_module`, as a user would write it."""
    module = nn.Sequential(*(nn.Linear(a, b, dtype=torch.float64) for a, b in ((7, 9), (9, 3), (1, 17), (17, 2))))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.from_numpy(counting(parameter.shape)))
    if grid.tensor:
        plan: dict[str, ParallelStyle] = {
            str(i): RowwiseParallel() if i % 2 else ColwiseParallel() for i in range(len(module))
        }
        parallelize_module(module, mesh[grid.tensor[-1]], plan, src_data_rank=None)
    for part in (*module, module):
        fsdp.fully_shard(part, mesh=mesh[grid.data])
    return module


def one_mesh(grid: Grid, mesh: DeviceMesh) -> nn.Module:
    """Parameters that are already tensors of the whole mesh (`dp_mesh_dims`, newer than torch 2.11)."""
    if not hasattr(fsdp, "DataParallelMeshDims"):
        return nn.Module()
    below = (TorchReplicate(),) * len(grid.data)
    cuts = (TorchShard(0),) * len(grid.tensor)
    tensors = (
        distribute_tensor(torch.from_numpy(counting((size,))), mesh, (*below, *cuts), src_data_rank=None)
        for size in SIZES[::2]
    )
    dims = fsdp.DataParallelMeshDims(shard=grid.data[-1], replicate=grid.data[0] if len(grid.data) > 1 else None)
    module = bag(tensors)
    fsdp.fully_shard(module, mesh=mesh, dp_mesh_dims=dims)
    return module


def bare_strided(grid: Grid, mesh: DeviceMesh) -> nn.Module:
    """Strided shards whose factor no other mesh dimension explains: several boxes, put side by side (trap 3)."""
    if grid.tensor:
        return nn.Module()
    cuts = (*(TorchReplicate() for _ in grid.data[1:]), _StridedShard(0, split_factor=3))
    return bag(distribute_tensor(torch.from_numpy(counting((n, 2))), mesh, cuts, src_data_rank=None) for n in SIZES)


BUILDS = (shard_rows, shard_columns, linear_layers, one_mesh, bare_strided)


def one_rank(grid: Grid, rank: int) -> dict[str, dict[str, Held]]:
    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=rank, world_size=grid.ranks, store=FakeStore())
    mesh = init_device_mesh("cpu", grid.sizes, mesh_dim_names=grid.data + grid.tensor)
    return {build.__name__: {name: held(p) for name, p in build(grid, mesh).named_parameters()} for build in BUILDS}


@cache
def every_rank(grid: Grid) -> list[dict[str, dict[str, Held]]]:
    # A process for each rank: torch caches meshes by equality, and a second rank in one process would get the first's.
    with CONTEXT.Pool(2, maxtasksperchild=1) as pool:
        return pool.starmap(one_rank, [(grid, rank) for rank in range(grid.ranks)], chunksize=1)


def cases(build: str, grid: Grid) -> Iterator[tuple[Held, ...]]:
    """Each parameter, as its ranks hold it."""
    ranks = [rank[build] for rank in every_rank(grid)]
    assert len({tuple(rank) for rank in ranks}) == 1
    return (tuple(rank[name] for rank in ranks) for name in ranks[0])


def by_pieces(one: Held) -> Array:
    """The local tensor, put together from our pieces of the global one."""
    full = counting(one.shape)
    local = np.full(local_shape(one.shape, one.mesh_shape, one.placements, one.coordinate), -1)
    for there, here in local_pieces(one.shape, one.mesh_shape, one.placements, one.coordinate):
        local[here.slices()] = full[there.slices()]
    return local


def by_torch(one: Held) -> Array:
    """The local tensor, if it were the one box of the global tensor that torch names."""
    shape, offset = one.torch_box
    return counting(one.shape)[tuple(slice(at, at + size) for at, size in zip(offset, shape, strict=True))]


def same(local: Array, one: Held) -> bool:
    # Where another dimension has already left a rank nothing, FSDP2 also cuts its own dimension to 0.
    return np.array_equal(local, one.local) or local.size == one.local.size == 0


@pytest.mark.parametrize("build", [build.__name__ for build in BUILDS])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_pieces_are_what_torch_holds_and_tile_the_tensor(build: str, grid: Grid) -> None:
    for ranks in cases(build, grid):
        times_held = np.zeros(ranks[0].shape, int)
        for one in ranks:
            assert same(by_pieces(one), one), one
            for there, _ in local_pieces(one.shape, one.mesh_shape, one.placements, one.coordinate):
                times_held[there.slices()] += 1
        parts = [n for n, p in zip(one.mesh_shape, one.placements, strict=True) if not isinstance(p, Replicate)]
        assert (times_held == grid.ranks // math.prod(parts)).all(), one


def every_case() -> Iterator[Held]:
    for grid in GRIDS:
        for build in BUILDS:
            for ranks in cases(build.__name__, grid):
                yield from ranks


def test_strided_and_empty_shards_are_among_the_cases() -> None:
    strided = sum(any(isinstance(p, StridedShard) for p in one.placements) for one in every_case())
    empty = sum(one.local.size == 0 for one in every_case())
    assert min(strided, empty) > 300, (strided, empty)


def test_torch_names_other_boxes_than_it_holds() -> None:
    """Trap 1, and why this module exists: torch's own answer, which DCP believes, is wrong for some uneven sizes."""
    wrong = [one for one in every_case() if not same(by_torch(one), one)]
    if not wrong:
        pytest.skip(f"torch {torch.__version__} names the boxes that it holds")
    assert all(any(isinstance(p, StridedShard) for p in one.placements) for one in wrong)
    assert all(same(by_pieces(one), one) for one in wrong)
