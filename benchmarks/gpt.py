"""A small GPT that knows nothing of parallelism, and the two ways to cut it over ranks that the benchmarks use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a GPT. `length`: tokens it sees at most; `hidden`: width of the MLP, in elements."""

    vocabulary: int
    length: int
    width: int
    heads: int
    hidden: int
    layers: int


class Attention(nn.Module):
    """Causal self-attention. The number of heads follows from the width of what wq gives, which TP halves."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_width = shape.width // shape.heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(shape.width, shape.width, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then an MLP, each on the normalised sum of all before."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.attention = Attention(shape)
        self.up = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Tokens and what follows them, (batch, length) both, to the mean loss; the head's weight is the embedding's."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.length, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        for weight in self.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02)
        self.tie()

    def tie(self) -> None:
        """The head and the embedding are one tensor, under two names."""
        self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        x = self.tokens(tokens) + self.positions(places)
        for block in self.blocks:
            x = block(x)
        return functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def cut_by_columns_and_rows(model: GPT, mesh: DeviceMesh) -> None:
    """Tensor parallelism over the 1-D `mesh`, activations between the blocks cut along the sequence."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    whole, cut = Replicate(), Shard(1)
    gather = PrepareModuleInput(input_layouts=cut, desired_input_layouts=whole)
    block_plan = {
        "norm1": SequenceParallel(),
        "attention": gather,
        "attention.wq": ColwiseParallel(),
        "attention.wk": ColwiseParallel(),
        "attention.wv": ColwiseParallel(),
        "attention.wo": RowwiseParallel(output_layouts=cut),
        "norm2": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=cut),
        "down": RowwiseParallel(output_layouts=cut),
    }
    for block in model.blocks:
        parallelize_module(block, mesh, block_plan)
    ends = {
        "tokens": RowwiseParallel(input_layouts=whole, output_layouts=cut),
        "positions": RowwiseParallel(input_layouts=whole, output_layouts=cut),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=cut, output_layouts=whole),
    }
    parallelize_module(model, mesh, ends)
    model.tie()


def shard_fully(model: GPT, mesh: DeviceMesh) -> None:
    """FSDP2 over the 1-D `mesh`: every block is gathered when it is needed."""
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
