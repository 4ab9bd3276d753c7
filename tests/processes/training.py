"""A small model cut over ranks in all the usual ways, and what each rank holds of it, as torch itself says."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

# None of them divides by all the ranks; the two rows of `offset` leave ranks 2 and 3 of 4 without any.
VOCABULARY, WIDTH, HIDDEN, LENGTH, BATCH = 13, 10, 14, 6, 4
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class Kind:
    """What is in the model. Batch norm has statistics that ranks do not share; stages cannot tie first to last."""

    tied: bool = True
    batch_norm: bool = False


class Block(nn.Module):
    """A frozen layer and an MLP beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.base(x) + self.down(functional.gelu(self.up(x)))


class Net(nn.Module):
    """Tokens (batch, length) to logits. A stage of a pipeline has only its part, and passes on what it has."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.embed: nn.Module | None = nn.Embedding(VOCABULARY, WIDTH)
        self.offset = nn.Parameter(torch.zeros(2, WIDTH))
        self.layers = nn.ModuleDict({"0": Block(), "1": Block()})
        self.norm = nn.BatchNorm1d(WIDTH) if kind.batch_norm else nn.LayerNorm(WIDTH)
        self.head: nn.Module | None = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        if kind.tied:
            self.head.weight = self.embed.weight  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.embed is not None:
            x = functional.dropout(self.embed(x) + self.offset.sum(0), 0.1)
        for layer in self.layers.values():
            x = layer(x)
        return x if self.head is None else self.head(self.norm(x.flatten(0, 1)))

    def keep(self, stage: int) -> None:
        """Become one of two stages."""
        del self.layers[str(1 - stage)]
        if stage == 0:
            self.norm, self.head = None, None
        else:
            self.embed, self.offset, self.calls = None, None, None
            self.forward = self._second  # type: ignore[method-assign]

    def _second(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.layers["1"](x).flatten(0, 1)))  # type: ignore[misc]


@dataclass(frozen=True)
class Cut:
    """A model cut over ranks: what to call, which part of each batch is this rank's, and its stage."""

    call: nn.Module
    part: int = 0
    parts: int = 1
    stage: int | None = None
    peer: int = 0


def plain(net: Net) -> Cut:
    return Cut(net)


def ddp(net: Net) -> Cut:
    return Cut(DistributedDataParallel(net), dist.get_rank(), dist.get_world_size())


def fsdp(net: Net) -> Cut:
    return _fsdp(net, init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",)))


def hsdp(net: Net) -> Cut:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    return _fsdp(net, mesh)


def tp(net: Net) -> Cut:
    _tp(net, init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",)))
    return Cut(net)


def fsdp_over_tp(net: Net) -> Cut:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("shard", "tp"))
    _tp(net, mesh["tp"])
    return _fsdp(net, mesh["shard"])


def pipeline(net: Net) -> Cut:
    """Two stages, each sharded over half of the ranks."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("stage", "shard"))
    stage, half = mesh["stage"].get_local_rank(), dist.get_world_size() // 2
    net.keep(stage)
    cut = _fsdp(net, mesh["shard"])
    return Cut(net, cut.part, cut.parts, stage, (dist.get_rank() + half) % dist.get_world_size())


def _fsdp(net: Net, mesh: DeviceMesh) -> Cut:
    for layer in net.layers.values():
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    parts = mesh.size()
    return Cut(net, dist.get_rank() % parts if mesh.ndim > 1 else mesh.get_local_rank(), parts)


def _tp(net: Net, mesh: DeviceMesh) -> None:
    for layer in net.layers.values():
        parallelize_module(layer, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


LAYOUTS: dict[str, Callable[[Net], Cut]] = {
    layout.__name__: layout for layout in (plain, ddp, fsdp, hsdp, tp, fsdp_over_tp, pipeline)
}


@dataclass(frozen=True)
class Holding:
    """What one rank holds. `tensors`: name → (global flat indices, values), 1-D each."""

    tensors: dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]
    objects: dict[str, Any]


def whole(held: Sequence[Holding], apart: str = "none") -> dict[str, Any]:
    """The tensors of all ranks put together, bit for bit, and their objects. What two ranks hold must be the same.

    Of tensors with `apart` in their names the first rank has the true values.
    """
    found: dict[str, Any] = {}
    for rank in held:
        for name, (places, values) in rank.tensors.items():
            known, here = found.setdefault(name, {}), dict(zip(places.tolist(), _bits(values), strict=True))
            assert apart in name or all(known.get(at, value) == value for at, value in here.items()), name
            found[name] = here | known
        assert all(found.setdefault(name, value) == value for name, value in rank.objects.items())
    return found


def fingerprint(held: Sequence[Holding]) -> str:
    """A digest of all that these ranks hold together."""
    found = sorted(whole(held).items())
    return hashlib.sha256(
        repr([(name, sorted(v.items()) if isinstance(v, dict) else v) for name, v in found]).encode()
    ).hexdigest()


def _bits(values: np.ndarray[Any, Any]) -> list[bytes]:
    return [value.tobytes() for value in values]


@dataclass
class Training:
    """Everything that a training loop holds. `step` makes one optimizer step and returns this rank's loss."""

    net: Net
    cut: Cut
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    data: torch.Generator
    places: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)

    @property
    def state(self) -> dict[str, Any]:
        return {
            "model": self.cut.call,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "data": self.data,
        }

    def step(self) -> float:
        tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1), generator=self.data)
        mine = tokens.tensor_split(self.cut.parts)[self.cut.part]
        self.optimizer.zero_grad()
        loss = self._backward(mine[:, :-1], mine[:, 1:].flatten())
        self.optimizer.step()
        self.scheduler.step()
        return loss

    def _backward(self, tokens: torch.Tensor, targets: torch.Tensor) -> float:
        if self.cut.stage is None:
            loss = functional.cross_entropy(self.cut.call(tokens), targets)
            loss.backward()
            return loss.item()
        if self.cut.stage == 0:
            out = self.net(tokens)
            dist.send(out.detach(), self.cut.peer)
            grad = torch.empty_like(out)
            dist.recv(grad, self.cut.peer)
            out.backward(grad)
            return 0.0
        middle = torch.empty(*tokens.shape, WIDTH)
        dist.recv(middle, self.cut.peer)
        middle.requires_grad_()
        loss = functional.cross_entropy(self.net(middle), targets)
        loss.backward()
        assert middle.grad is not None
        dist.send(middle.grad, self.cut.peer)
        return loss.item()

    def holds(self) -> Holding:
        """What this rank holds: of tensors, by name, the global flat indices and the values; objects as they are.

        Which elements these are is not computed but seen: in a second model, cut alike, whose values are the indices.
        """
        found: dict[str, Any] = {}
        for name, parameter in self.net.named_parameters():
            found[name] = self.places[name], _array(parameter)
            for key in MOMENTS:
                value = self.optimizer.state.get(parameter, {}).get(key)
                if value is not None:
                    whole = np.zeros(1) if value.ndim == 0 else self.places[name]
                    found[f"{key}.{name}"] = whole, _array(value)
        for name, buffer in self.net.named_buffers():
            found[name] = np.arange(buffer.numel()), _array(buffer)
        objects = self.scheduler.state_dict() | {"data": self.data.get_state().numpy().tobytes()}
        return Holding(found, objects | self._options())

    def _options(self) -> dict[str, Any]:
        """By parameter: a stage of a pipeline may have no parameter of a group."""
        names = {id(parameter): name for name, parameter in self.net.named_parameters()}
        return {
            f"options.{names[id(parameter)]}": (group["lr"], group["weight_decay"])
            for group in self.optimizer.param_groups
            for parameter in group["params"]
        }


def _array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return np.array(local.detach().numpy().reshape(-1), copy=True)


def build(layout: str, kind: Kind, seed: int) -> Training:
    """A new training in this layout; `seed` decides the values and all random streams."""
    torch.manual_seed(seed)
    net, cut_like = Net(kind), Net(kind)
    with torch.no_grad():
        for parameter in cut_like.parameters():
            parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape))
    LAYOUTS[layout](cut_like)
    places = {name: _array(parameter).astype(np.int64) for name, parameter in cut_like.named_parameters()}
    cut = LAYOUTS[layout](net)
    learned = [parameter for parameter in net.parameters() if parameter.requires_grad]
    groups = [{"params": [p for p in learned if p.ndim > 1]}, {"params": [p for p in learned if p.ndim == 1]}]
    # Fused takes no mixture of plain and sharded parameters.
    fused = len({isinstance(parameter, DTensor) for parameter in learned}) == 1
    optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=fused)
    optimizer.param_groups[1]["weight_decay"] = 0.0
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[2, 4, 4, 7], gamma=0.5)
    # Ranks that share a part of the batch must draw the same dropout.
    torch.manual_seed(seed * 100 + cut.part)
    return Training(net, cut, optimizer, scheduler, torch.Generator().manual_seed(seed), places)
