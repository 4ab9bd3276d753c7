"""What each rank of a very large job claims, without a byte of data: models by their tensors, cut by known rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np

from dscheck.layout.boxes import Boxes, Ints, ints, padded
from dscheck.layout.flat import flat_range_boxes
from dscheck.layout.region import Region
from dscheck.manifest.plan import TensorRow
from dscheck.save.claims import RankClaims

STATES = (
    ("model.{}", "bfloat16"),
    ("optimizer.state.exp_avg.{}", "float32"),
    ("optimizer.state.exp_avg_sq.{}", "float32"),
    ("optimizer.state.master.{}", "float32"),
)
"""A parameter, its two moments, and the copy in full precision that mixed precision keeps of it."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter: its layer (-1: before all, the number of layers: behind all), and along which dimension tensor
    parallelism cuts it; None: not at all. `experts`: its first dimension is experts.
    """

    name: str
    shape: tuple[int, ...]
    layer: int
    tp_dim: int | None
    experts: bool = False


def dense(layers: int, width: int, inner: int, kv: int, vocabulary: int) -> list[Parameter]:
    """A Llama-like transformer; `kv` is the width of keys and values."""
    made = [Parameter("embed", (vocabulary, width), -1, 0)]
    for layer in range(layers):
        for name, shape, dim in (
            ("q", (width, width), 0),
            ("k", (kv, width), 0),
            ("v", (kv, width), 0),
            ("o", (width, width), 1),
            ("gate", (inner, width), 0),
            ("up", (inner, width), 0),
            ("down", (width, inner), 1),
            ("norm1", (width,), None),
            ("norm2", (width,), None),
        ):
            made.append(Parameter(f"layers.{layer:03}.{name}", shape, layer, dim))
    return [*made, Parameter("norm", (width,), layers, None), Parameter("output", (vocabulary, width), layers, 0)]


def mixture(layers: int, width: int, inner: int, experts: int, vocabulary: int) -> list[Parameter]:
    """Attention as above, and experts kept as one tensor a projection."""
    made = [row for row in dense(layers, width, inner, width // 8, vocabulary) if "gate" not in row.name]
    made = [row for row in made if row.name.rpartition(".")[2] not in ("up", "down")]
    for layer in range(layers):
        made.append(Parameter(f"layers.{layer:03}.router", (experts, width), layer, None))
        for name, shape in (("w1", (inner, width)), ("w2", (width, inner)), ("w3", (inner, width))):
            made.append(Parameter(f"layers.{layer:03}.{name}", (experts, *shape), layer, None, experts=True))
    return made


class Layout(Protocol):
    """A job of `ranks` ranks: what `rank` claims, and how it is called."""

    title: str
    ranks: int

    def claims(self, rank: int) -> RankClaims: ...


@dataclass
class Grid:
    """Every tensor is cut by torch.chunk's rule: a dimension by a number of parts, of which a rank has one."""

    title: str
    ranks: int
    parameters: Sequence[Parameter]
    cuts: Callable[[Parameter], Iterable[tuple[int, int, int]]]
    """Of a parameter: dimension, parts, and how many neighbouring ranks have the same part."""

    @cached_property
    def _columns(self) -> tuple[tuple[TensorRow, ...], Ints, Ints, Ints, Ints]:
        rows = sorted((form.format(p.name), dtype, p) for form, dtype in STATES for p in self.parameters)
        tensors = tuple(TensorRow(name, dtype, p.shape) for name, dtype, p in rows)
        shapes = padded([row.shape for row in tensors], max(len(row.shape) for row in tensors))
        parts, same = np.ones_like(shapes), np.ones_like(shapes)
        for number, (_, _, parameter) in enumerate(rows):
            for dim, count, neighbours in self.cuts(parameter):
                parts[number, dim], same[number, dim] = count, neighbours
        return tensors, shapes, parts, same, ints(len(row.shape) for row in tensors)

    def claims(self, rank: int) -> RankClaims:
        tensors, shapes, parts, same, ndim = self._columns
        chunk = -(-shapes // parts)
        start = np.minimum(rank // same % parts * chunk, shapes)
        stop = np.minimum(start + chunk, shapes)
        filled = (start < stop).all(axis=1)
        return RankClaims(
            f"node{rank // 8:05}",
            (("rank", rank),),
            tensors,
            ((rank,),),
            np.zeros(len(tensors), np.int64),
            np.zeros(len(tensors), np.bool_),
            np.append(0, np.cumsum(filled)),
            Boxes.cut(start[filled], stop[filled], ndim[filled]),
        )


def fsdp(ranks: int, parameters: Sequence[Parameter], title: str = "") -> Grid:
    """Every tensor cut along its first dimension over all ranks."""
    return Grid(title or f"FSDP over {ranks:,} ranks", ranks, parameters, lambda p: [(0, ranks, 1)])


def moe(ranks: int, expert_parts: int, parameters: Sequence[Parameter]) -> Grid:
    """Experts over `expert_parts` groups of ranks, and within each along the next dimension; the rest as FSDP."""
    each = ranks // expert_parts

    def cuts(parameter: Parameter) -> list[tuple[int, int, int]]:
        return [(0, expert_parts, each), (1, each, 1)] if parameter.experts else [(0, ranks, 1)]

    return Grid(f"MoE: experts over {expert_parts} x FSDP over {each}", ranks, parameters, cuts)


_Group = tuple[tuple[TensorRow, ...], list[tuple[Parameter, list[int]]], Ints, tuple[tuple[int, ...], ...]]


@dataclass
class Megatron:
    """TP x PP x DP; each DP rank has a flat range of what its stage and TP rank keep for the optimizer."""

    tp: int
    pp: int
    dp: int
    layers: int
    parameters: Sequence[Parameter]
    title: str = field(init=False)
    ranks: int = field(init=False)
    _groups: dict[tuple[int, int], _Group] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ranks = self.tp * self.pp * self.dp
        self.title = f"TP {self.tp} x PP {self.pp} x DP {self.dp}, distributed optimizer"

    def claims(self, rank: int) -> RankClaims:
        tp, dp, pp = rank % self.tp, rank // self.tp % self.dp, rank // (self.tp * self.dp)
        if (tp, pp) not in self._groups:
            self._groups[tp, pp] = self._group(tp, pp)
        tensors, rows, held_by, everyone = self._groups[tp, pp]
        boxes = [self._shard(parameter, tp) for parameter, _ in rows]
        edges = np.cumsum([0, *(box.numel for box in boxes)])
        begin, end = int(edges[-1]) * dp // self.dp, int(edges[-1]) * (dp + 1) // self.dp
        mine: dict[int, list[Region]] = {}
        for (_, numbers), box, at in zip(rows, boxes, edges.tolist(), strict=False):
            mine[numbers[0]] = [box]
            first, last = max(begin - at, 0), min(end - at, box.numel)
            if first < last:
                flat = [part.shift(box.start) for part in flat_range_boxes(box.shape, first, last)]
                mine |= dict.fromkeys(numbers[1:], flat)
        counts = [len(mine.get(number, ())) for number in range(len(tensors))]
        return RankClaims(
            f"node{rank // 8:05}",
            (("pp", pp), ("dp", dp), ("tp", tp)),
            tensors,
            (*everyone, (rank,), tuple(self._rank(other, dp, pp) for other in range(self.tp))),
            held_by,
            np.zeros(len(tensors), np.bool_),
            np.cumsum([0, *counts]),
            Boxes.of([box for number in range(len(tensors)) for box in mine.get(number, ())]),
        )

    def _group(self, tp: int, pp: int) -> _Group:
        """What the ranks of one TP rank and stage have alike: tensors; parameters, each with the numbers of its
        tensors; which holder set each tensor has; and the sets of cut parameters and of uncut ones.
        """
        of_stage = [p for p in self.parameters if self._stage(p) == pp]
        states = sorted(
            (form.format(p.name), dtype, i, state)
            for i, p in enumerate(of_stage)
            for state, (form, dtype) in enumerate(STATES)
        )
        numbers = [[0] * len(STATES) for _ in of_stage]
        for number, (_, _, i, state) in enumerate(states):
            numbers[i][state] = number
        tensors = tuple(TensorRow(name, dtype, of_stage[i].shape) for name, dtype, i, _ in states)
        held_by = ints(2 * (state > 0) + (of_stage[i].tp_dim is None) for _, _, i, state in states)
        cut = tuple(self._rank(tp, dp, pp) for dp in range(self.dp))
        whole = tuple(self._rank(other, dp, pp) for dp in range(self.dp) for other in range(self.tp))
        return tensors, list(zip(of_stage, numbers, strict=True)), held_by, (cut, whole)

    def _rank(self, tp: int, dp: int, pp: int) -> int:
        return (pp * self.dp + dp) * self.tp + tp

    def _stage(self, parameter: Parameter) -> int:
        return min(max(parameter.layer, 0) * self.pp // self.layers, self.pp - 1)

    def _shard(self, parameter: Parameter, tp: int) -> Region:
        start, stop = [0] * len(parameter.shape), list(parameter.shape)
        if parameter.tp_dim is not None:
            chunk = math.ceil(parameter.shape[parameter.tp_dim] / self.tp)
            start[parameter.tp_dim] = min(tp * chunk, stop[parameter.tp_dim])
            stop[parameter.tp_dim] = min((tp + 1) * chunk, stop[parameter.tp_dim])
        return Region(tuple(start), tuple(stop))
