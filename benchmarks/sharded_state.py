"""A GPT's weights and AdamW moments, of a wanted size, in one of three layouts, with contents that tell their place."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

Layout = Literal["rows", "columns", "stages", "whole"]
"""Every tensor cut by rows over the ranks (as FSDP does), by columns, whole layers a rank (as pipelines do), or all on
every rank (as DDP does).
"""

KINDS = ("", "exp_avg", "exp_avg_sq")
BYTES_EACH = 4 * len(KINDS)
STEP = 7.0


def gpt_shapes(nbytes: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of a GPT that has, with both moments in fp32, about `nbytes`."""
    width = 1024 if nbytes >= 400 << 20 else 128
    block = {
        **{f"attention.{name}.weight": (width, width) for name in ("wq", "wk", "wv", "wo")},
        "norm1.weight": (width,),
        "norm2.weight": (width,),
        "up.weight": (4 * width, width),
        "down.weight": (width, 4 * width),
    }
    per_layer = 12 * width * width + 2 * width
    wanted = nbytes // BYTES_EACH
    layers = max(1, int(0.95 * wanted) // per_layer)
    vocabulary = max(2, (wanted - layers * per_layer) // width)
    shapes: dict[str, tuple[int, ...]] = {"tokens.weight": (vocabulary, width)}
    for layer in range(layers):
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


@dataclass(frozen=True, slots=True)
class Live:
    """What one rank holds: a module and its optimizer, whose state exists."""

    model: nn.Module
    optimizer: torch.optim.AdamW

    def named(self) -> dict[str, torch.Tensor]:
        """Every tensor by a flat name, as torch's own checkpoints are given it."""
        tensors: dict[str, torch.Tensor] = dict(self.model.named_parameters())
        names = {weight: name for name, weight in self.model.named_parameters()}
        for weight, state in self.optimizer.state.items():
            tensors |= {f"{names[weight]}.{key}": value for key, value in state.items()}
        return {name: tensor.detach() for name, tensor in tensors.items()}

    def mapping(self) -> dict[str, object]:
        """As a Checkpointer is given it."""
        return {"model": self.model, "optimizer": self.optimizer}

    def nbytes(self) -> int:
        return sum(part.numel() * part.itemsize for part, *_ in self._parts())

    def clear(self) -> None:
        """Every byte that a load is to bring is another one afterwards."""
        for part, *_ in self._parts():
            part.zero_()

    def fill(self) -> None:
        for part, name, start, shape in self._parts():
            part.copy_(contents(name, shape, start, part.shape))

    def wrong(self) -> list[str]:
        """The names of tensors that do not hold, bit for bit, what `fill` puts there."""
        return [
            name
            for part, name, start, shape in self._parts()
            if not torch.equal(part.cpu().view(torch.int32), contents(name, shape, start, part.shape).view(torch.int32))
        ]

    def _parts(self) -> Iterator[tuple[torch.Tensor, str, tuple[int, ...], torch.Size]]:
        """Local memory, its name, where it begins in the whole tensor, and that tensor's shape."""
        for name, tensor in self.named().items():
            if not name.endswith(".step"):
                local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                yield local, name, start_of(tensor), tensor.shape


def live(shapes: dict[str, tuple[int, ...]], layout: Layout, mesh: DeviceMesh) -> Live:
    """The state of this rank in `layout`, cleared, on the mesh's devices. `mesh`: all ranks, 1-D."""
    module = nn.Module()
    for name, shape in _mine(shapes, layout).items():
        *path, last = name.split(".")
        inner = module
        for part in path:
            if part not in dict(inner.named_children()):
                inner.add_module(part, nn.Module())
            inner = inner.get_submodule(part)
        inner.register_parameter(last, nn.Parameter(_tensor(shape, layout, mesh)))
    optimizer = torch.optim.AdamW(module.parameters())
    for weight in module.parameters():
        moments = {kind: torch.zeros_like(weight, requires_grad=False) for kind in KINDS[1:]}
        optimizer.state[weight] = {"step": torch.tensor(STEP), **moments}
    return Live(module, optimizer)


def contents(name: str, shape: torch.Size, start: tuple[int, ...], size: torch.Size) -> torch.Tensor:
    """What belongs in the box of `size` at `start`: positive fp32 whose bits depend on the name and the place."""
    flat = torch.tensor(zlib.crc32(name.encode()) & 0xFFFFFF, dtype=torch.int32)
    for dim, extent in enumerate(size):
        places = torch.arange(start[dim], start[dim] + extent, dtype=torch.int32)
        stride = torch.Size(shape[dim + 1 :]).numel()
        flat = flat.unsqueeze(-1) + places * stride
    # An odd factor modulo 2**32 keeps places apart; the mask leaves out NaN, infinities and the sign.
    return (flat * -1640531535 & 0x3FFFFFFF).view(torch.float32)


def _mine(shapes: dict[str, tuple[int, ...]], layout: Layout) -> dict[str, tuple[int, ...]]:
    if layout != "stages":
        return shapes
    rank, ranks = dist.get_rank(), dist.get_world_size()
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    mine, before = {}, 0
    for name, shape in shapes.items():
        if before * ranks // total == rank:
            mine[name] = shape
        before += torch.Size(shape).numel()
    return mine


def _tensor(shape: tuple[int, ...], layout: Layout, mesh: DeviceMesh) -> torch.Tensor:
    if layout in ("stages", "whole"):
        return torch.zeros(shape, device=mesh.device_type)
    dim = 0 if layout == "rows" else len(shape) - 1
    _, extent = _chunk(shape[dim], mesh.size(), mesh.get_local_rank())
    local = torch.zeros(*shape[:dim], extent, *shape[dim + 1 :], device=mesh.device_type)
    size = torch.Size(shape)
    stride = tuple(size[after + 1 :].numel() for after in range(len(shape)))
    return DTensor.from_local(local, mesh, [Shard(dim)], run_check=False, shape=size, stride=stride)


def start_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """Where this rank's part of `tensor` begins in it."""
    start = [0] * tensor.ndim
    if isinstance(tensor, DTensor):
        (shard,) = tensor.placements
        mesh = tensor.device_mesh
        start[shard.dim] = _chunk(tensor.shape[shard.dim], mesh.size(), mesh.get_local_rank())[0]
    return tuple(start)


def _chunk(extent: int, parts: int, index: int) -> tuple[int, int]:
    """Where the part begins that torch.chunk gives, and how long it is."""
    each = -(-extent // parts)
    start = min(extent, index * each)
    return start, min(extent, start + each) - start
