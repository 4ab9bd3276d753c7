"""How a layout that is known by its degrees of parallelism alone cuts tensors that are known by name and shape alone.

A stated rule, not a guess about a framework (docs/plan.md): what it says of a tensor can be replaced by patterns.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from dscheck.errors import ConfigError
from dscheck.layout.placement import Placement, Replicate, Shard, StridedShard, local_pieces
from dscheck.layout.region import Region

AXES = ("pp", "dp", "fsdp", "ep", "tp")
"""From the slowest to the fastest as ranks are counted."""

SECOND = ("o_proj", "down_proj", "out_proj", "c_proj", "dense_4h_to_h", "linear_proj", "linear_fc2", "wo", "w2")
"""Parts of names whose tensors tensor parallelism cuts along the second dimension: what leads back to the width."""

NO = -1

MOST_RANKS = 1_000_000
"""Of a layout: no machine has more, and each rank is looked at."""


@dataclass(frozen=True, slots=True)
class Override:
    """Of tensors whose name `pattern` is found in: the dimension that `axis` cuts, the stage for "pp", or NO."""

    pattern: re.Pattern[str]
    axis: str
    value: int

    @classmethod
    def parse(cls, text: str) -> Override:
        """`REGEX:AXIS=NUMBER` or `REGEX:AXIS=no`. Raises ConfigError."""
        found = re.fullmatch(rf"(.+):({'|'.join(AXES)})=(no|\d{{1,9}})", text)
        try:
            if found is not None and found[2] != "dp":
                return cls(re.compile(found[1]), found[2], NO if found[3] == "no" else int(found[3]))
        except re.error as error:
            raise ConfigError(f"--cut {text!r}: {found[1] if found else text!r} is no pattern ({error})") from error
        raise ConfigError(f"--cut {text!r}: expected REGEX:AXIS=NUMBER or REGEX:AXIS=no, AXIS one of pp, fsdp, ep, tp")


def parse_degrees(text: str) -> dict[str, int]:
    """`tp=4,pp=2,dp=8` as the degree of each axis, 1 where it is not named. Raises ConfigError."""
    named: dict[str, int] = {}
    for part in text.split(","):
        found = re.fullmatch(rf"\s*({'|'.join(AXES)})=([1-9][0-9]*)\s*", part)
        if found is None:
            raise ConfigError(
                f"--to {text!r}: expected AXIS=DEGREE, with commas between, AXIS one of {', '.join(AXES)}"
            )
        if found[1] in named:
            raise ConfigError(f"--to {text!r}: {found[1]} is named twice")
        if len(found[2]) > len(str(MOST_RANKS)):  # Python refuses to read a number of thousands of digits
            raise _too_many(text)
        named[found[1]] = int(found[2])
    if math.prod(named.values()) > MOST_RANKS:
        raise _too_many(text)
    return dict.fromkeys(AXES, 1) | named


def _too_many(text: str) -> ConfigError:
    return ConfigError(f"--to {text!r}: expected at most {MOST_RANKS} ranks together")


@dataclass(slots=True)
class Recipe:
    """What the ranks of a layout hold. `layers` is the number of layers; `unsure` collects the names that no rule knew.

    `experts`: how many numbered experts a layer has.
    """

    degrees: dict[str, int]
    overrides: Sequence[Override]
    layers: int
    experts: int
    unsure: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, degrees: dict[str, int], overrides: Sequence[Override], names: Iterable[str]) -> Recipe:
        names = list(names)
        layers = max((layer for name in names if (layer := _layer(name)) is not None), default=-1) + 1
        experts = max((expert for name in names if (expert := _expert(name)) is not None), default=-1) + 1
        return cls(degrees, overrides, layers, experts)

    @property
    def ranks(self) -> int:
        return math.prod(self.degrees.values())

    def coordinate(self, rank: int) -> dict[str, int]:
        """Where a rank is on each axis."""
        found = {}
        for axis in reversed(AXES):
            found[axis], rank = rank % self.degrees[axis], rank // self.degrees[axis]
        return {axis: found[axis] for axis in AXES}

    def regions(self, name: str, shape: tuple[int, ...], at: dict[str, int]) -> list[Region]:
        """What the rank at this coordinate holds of a tensor; `dp` replicates."""
        if not self._on_stage(name, at["pp"]) or not self._on_expert_rank(name, at["ep"]):
            return []
        dims = {"fsdp": self._fsdp_dim(name), "ep": self._ep_dim(name, shape), "tp": self._tp_dim(name, shape)}
        placements: list[Placement] = []
        for axis, dim in dims.items():
            faster = [other for other in dims if AXES.index(other) > AXES.index(axis) and dims[other] == dim]
            before = math.prod(self.degrees[other] for other in faster)
            if not 0 <= dim < len(shape):
                placements.append(Replicate())
            else:
                placements.append(StridedShard(dim, before) if before > 1 else Shard(dim))
        mesh, coordinate = [self.degrees[axis] for axis in dims], [at[axis] for axis in dims]
        return [box for box, _ in local_pieces(shape, mesh, placements, coordinate)]

    def _on_stage(self, name: str, stage: int) -> bool:
        """Layers in equal, consecutive groups; what belongs to no layer is counted on every stage."""
        stages = self.degrees["pp"]
        chosen, layer = self._chosen(name, "pp"), _layer(name)
        if chosen is not None:
            return chosen in (NO, stage)
        if layer is None or stages == 1:
            if stages > 1:
                self.unsure.add(name)
            return True
        return layer // -(-self.layers // stages) == stage

    def _on_expert_rank(self, name: str, rank: int) -> bool:
        expert = _expert(name)
        if expert is None or self._chosen(name, "ep") == NO:
            return True
        return expert // -(-self.experts // self.degrees["ep"]) == rank

    def _fsdp_dim(self, name: str) -> int:
        chosen = self._chosen(name, "fsdp")
        return 0 if chosen is None else chosen

    def _tp_dim(self, name: str, shape: tuple[int, ...]) -> int:
        chosen = self._chosen(name, "tp")
        if chosen is not None:
            return chosen
        first = 1 if self._ep_dim(name, shape) == 0 else 0  # behind the experts
        back = bool(set(name.split(".")) & {*SECOND})
        return first + back if len(shape) > first + 1 else NO

    def _ep_dim(self, name: str, shape: tuple[int, ...]) -> int:
        chosen = self._chosen(name, "ep")
        together = "experts" in name.split(".") and _expert(name) is None and len(shape) > 2
        return (0 if together else NO) if chosen is None or _expert(name) is not None else chosen

    def _chosen(self, name: str, axis: str) -> int | None:
        return next((o.value for o in self.overrides if o.axis == axis and o.pattern.search(name)), None)


def _layer(name: str) -> int | None:
    """The first number among the parts of a name that does not count experts."""
    parts = name.split(".")
    for before, part in pairwise(["", *parts]):
        if part.isdecimal() and before != "experts":
            return int(part)
    return None


def _expert(name: str) -> int | None:
    """The number behind `experts` in a name."""
    parts = name.split(".")
    for before, part in pairwise(parts):
        if before == "experts" and part.isdecimal():
            return int(part)
    return None
