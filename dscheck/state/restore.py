"""Putting a checkpoint back: matched and allocated before the first byte, installed after the last."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import torch

from dscheck.errors import StateError, StateMismatchError
from dscheck.manifest.objects import decode_object
from dscheck.state import rng as streams
from dscheck.state.leaf import Target
from dscheck.state.leaves import Held
from dscheck.state.memory import References
from dscheck.state.modules import reshard
from dscheck.state.objects import decode, like_live, tensors_in
from dscheck.state.optimizer_load import OptimizerLoad
from dscheck.state.overlap import overlaps_itself, refuse_shared_elements
from dscheck.state.saved import Match, SavedState, checked_only, shown
from dscheck.state.slots import Slot, called
from dscheck.state.survey import Survey
from dscheck.state.tensors import local_of
from dscheck.state.wrappers import match_described, refuse_saved_wrapper

Rng = Literal["exact", "equivalent", "none"]
_OF_RANK = re.compile(r"@rank\d+$")


@dataclass(slots=True)
class Restore:
    """A load that has been prepared and has changed nothing yet.

    `tensors`: the memory to fill, live or new. `missing`: live names that the checkpoint lacks. `unexpected`: saved
    names below the wanted ones for which this rank has no place; other ranks may have one.
    """

    tensors: tuple[Target, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    _steps: list[Callable[[], None]]
    _rng: Callable[[], Rng]

    def finish(self) -> Rng:
        """Install everything once all tensors are filled, random streams last; says how those were restored."""
        for step in self._steps:
            step()
        return self._rng()


def prepare(
    found: Survey, saved: SavedState, *, rank: int, world: int, rng: bool, only: Sequence[str] | None, strict: bool
) -> Restore:
    """Match the live state with a checkpoint. Touches nothing live.

    Raises StateMismatchError for missing names if `strict` (and for unexpected ones where no other rank could have a
    place for them), for ties that were saved as two tensors, for tensors that are partly the same memory, and for
    objects that only as many ranks as saved may load.
    """
    match = Match(saved, checked_only(only))
    work = _Preparation(found, match, rank, world)
    work.tensors()
    work.optimizers()
    work.objects()
    put_rng = work.random_streams(rng)
    match.check_only()
    match.check_conflicts(world)
    refuse_shared_elements(match.targets)
    unexpected = tuple(work.unexpected())
    if strict and (match.missing or (unexpected and world == 1)):
        raise _mismatch(match.missing, unexpected)
    return Restore(tuple(match.targets), tuple(match.missing), unexpected, work.steps, put_rng)


def _mismatch(missing: Sequence[str], unexpected: Sequence[str]) -> StateMismatchError:
    lacks = f"the checkpoint lacks {shown(missing)}, which the live state has" if missing else ""
    extra = f"the checkpoint has {shown(unexpected)}, which the live state lacks" if unexpected else ""
    return StateMismatchError(
        f"{'; '.join(filter(None, (lacks, extra)))}. Load with strict=False to go on without, or name what to load in "
        "only=[...]",
        missing=list(missing),
        unexpected=list(unexpected),
    )


class _Preparation:
    def __init__(self, found: Survey, match: Match, rank: int, world: int) -> None:
        self._found, self._match, self._rank, self._world = found, match, rank, world
        self._references = References(match, rank)
        self.steps: list[Callable[[], None]] = []

    def tensors(self) -> None:
        """The live tensors, in place; those that are lazy views are written as a whole afterwards."""
        for held in self._found.leaves.held():
            if not any(map(self._match.wants, held.names)):
                continue
            name = self._saved_name(held)
            if name is None:
                refuse_saved_wrapper(held.name, self._match, "a plain tensor", "wrap or quantize it before the load")
                self._match.missing.append(held.name)
                continue
            _refuse_overlap(held)
            self._match.fill(held.target(name))
            if held.copied:
                self.steps.append(partial(_write_lazy, held))
        for known in self._found.leaves.wrappers():
            match_described(known.names, known.described, self._match)
        for name, module in self._found.modules.items():
            if self._match.touches(name):
                self.steps.append(partial(reshard, module))

    def _saved_name(self, held: Held) -> str | None:
        saved = self._match.saved
        names = [name for name in held.names if name in saved.tensors and self._match.wants(name)]
        rows = {saved.row(name): name for name in names}
        if len(rows) > 1:
            raise StateMismatchError(
                f"{shown(rows.values())} are tied here and were saved as {len(rows)} tensors: one would overwrite the "
                "other. Untie them, or load one of them with only=[...]",
                names=list(rows.values()),
            )
        self._match.used.update(names)
        return names[0] if names else None

    def optimizers(self) -> None:
        for optimizer in self._found.optimizers:
            if self._match.touches(optimizer.name):
                load = OptimizerLoad(optimizer)
                load.prepare(self._match, self._references)
                self.steps.append(load.finish)

    def objects(self) -> None:
        for name, slot in self._found.objects.items():
            if self._match.wants(name):
                make = self._per_rank(name, slot) if name in self._found.per_rank else self._shared(name, slot)
                if make is not None:
                    self.steps.append(partial(_write, slot, make))

    def _shared(self, name: str, slot: Slot) -> Callable[[], Any] | None:
        saved = self._match.saved
        if name in saved.ours:
            return self._decoded(name, slot, self._match.object(name))
        if saved.world == self._world and name in saved.mine(self._rank):
            return self._decoded(name, slot, saved.mine(self._rank)[name])
        self._match.missing.append(name)
        return None

    def _per_rank(self, name: str, slot: Slot) -> Callable[[], Any] | None:
        saved, then = self._match.saved, self._found.per_rank[name].on_reshard
        if saved.world == self._world:
            mine = saved.mine(self._rank)
            return self._decoded(name, slot, mine[name]) if name in mine else self._shared(name, slot)
        if then == "drop":
            return None
        if then == "first":
            mine = saved.mine(0)
            return self._decoded(name, slot, mine[name]) if name in mine else self._shared(name, slot)
        if then is None:
            raise StateMismatchError(
                f"'{name}' belongs to each of the {saved.world} ranks that saved it, and {self._world} ranks load: say "
                'what then with per_rank(obj, on_reshard=callable | "first" | "drop")',
                names=[name],
            )
        kept = [saved.mine(rank) for rank in range(saved.world)]
        values = [self._decoded(name, slot, mine[name], in_place=False) for mine in kept if name in mine]
        if not values:
            return self._shared(name, slot)
        return partial(_resharded, name, then, values, self._rank, self._world)

    def _decoded(self, name: str, slot: Slot, stored: Any, in_place: bool = True) -> Callable[[], Any]:
        """The object, made now, so that damage shows before anything is touched; its tensors are filled later."""
        self._match.used.add(name)
        live = _LiveTensors(slot)
        value = decode(stored, name, self._references.finder(live if in_place else {}))
        if tensors_in(value, name):
            value = like_live(value, name, live)
        if in_place:
            slot.check(value)
        return partial(_given, value)

    def random_streams(self, rng: bool) -> Callable[[], Rng]:
        """What restores the random streams, and says how."""
        saved, key = self._match.saved, streams.KEY
        if not rng or not self._match.wants(key):
            return lambda: "none"
        same = saved.world == self._world
        kept = [saved.mine(rank) for rank in ([self._rank] if same else streams.sampled(saved.world))]
        if any(key not in mine for mine in kept):
            return lambda: "none"
        states = [decode_object(mine[key], key) for mine in kept]
        if same:
            return lambda: "exact" if streams.restore(states[0]) else "equivalent"
        return partial(_derive, states, self._rank, self._world)

    def unexpected(self) -> Iterator[str]:
        """Saved names that are wanted by their beginning and that nothing here took."""
        saved, used = self._match.saved, self._match.used
        rows = {saved.row(name) for name in used if name in saved.tensors}
        for name in self._below_wanted():
            tied = name in saved.tensors and saved.row(name) in rows
            if name not in used and not tied and not self._is_another_ranks(name):
                yield name
        for optimizer in self._found.optimizers:
            if self._match.wants(optimizer.name):
                for parameter in saved.options.get(optimizer.name, ()):
                    if (name := f"{optimizer.name}.{parameter}") not in used:
                        yield name

    def _below_wanted(self) -> Iterator[str]:
        for top in self._found.tops:
            for name in self._match.saved.under.get(top.partition(".")[0], ()):
                if (name == top or name.startswith(f"{top}.")) and self._match.wants(name):
                    yield name

    def _is_another_ranks(self, name: str) -> bool:
        base, at, _ = name.rpartition("@rank")
        return bool(at) and any(base == owner or base.startswith(f"{owner}.") for owner in self._found.per_rank)


class _LiveTensors(Mapping[str, torch.Tensor]):
    """The tensors of a live object by the names they are saved under, read only if one is asked for."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot

    @cached_property
    def _tensors(self) -> dict[str, torch.Tensor]:
        return tensors_in(self._slot.read(), self._slot.name)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[_OF_RANK.sub("", name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _resharded(name: str, then: Callable[..., Any], values: Sequence[Callable[[], Any]], rank: int, world: int) -> Any:
    return called(name, "on_reshard", then, [value() for value in values], rank, world)


def _write(slot: Slot, make: Callable[[], Any]) -> None:
    slot.write(make())


def _given(value: Any) -> Any:
    return value


def _derive(states: Sequence[Mapping[str, Any]], rank: int, world: int) -> Rng:
    streams.derive(states, rank, world)
    return "equivalent"


def _refuse_overlap(held: Held) -> None:
    """A tensor with fewer elements in memory than it shows cannot be given its values one by one."""
    if overlaps_itself(held.local):
        raise StateError(
            f"tensor '{held.name}' is expanded, or overlaps itself (shape {list(held.local.shape)}, strides "
            f"{list(held.local.stride())}), so it cannot be loaded in place: clone() it",
            path=held.name,
        )


def _write_lazy(held: Held) -> None:
    local_of(held.tensor).detach().copy_(held.local)
