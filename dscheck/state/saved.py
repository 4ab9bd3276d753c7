"""What a checkpoint holds, as the load room tells it, and what of it the live state wants."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dscheck.errors import ConfigError, StateMismatchError
from dscheck.state.leaf import Target

_SHOWN = 20


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor of a checkpoint under one of its names; `row` is the name that its row has (None: this very name)."""

    dtype: str
    shape: tuple[int, ...]
    row: str | None = None


@dataclass(frozen=True)
class SavedState:
    """What a checkpoint holds, as this rank sees it.

    `tensors`: by every name, aliases included. `ours`: plain objects in tagged form, this rank's own where the number
    of ranks is the same. `conflicted`: paths of `ours` whose saved values differ between ranks, where it is another,
    and `<optimizer>.<parameter>` of options that contradict each other, which `options` then lacks.
    `mine`: what a saved rank kept for itself. `options`: optimizer → parameter → tagged options. `world`: saved ranks.
    """

    tensors: Mapping[str, SavedTensor]
    ours: Mapping[str, Any]
    conflicted: frozenset[str]
    mine: Callable[[int], Mapping[str, Any]]
    options: Mapping[str, Mapping[str, Any]]
    world: int

    def row(self, name: str) -> str:
        """The name of the row behind one of a tensor's names."""
        return self.tensors[name].row or name

    @cached_property
    def under(self) -> Mapping[str, tuple[str, ...]]:
        """The names of tensors and plain objects by their first component."""
        found: dict[str, list[str]] = {}
        for name in (*self.tensors, *self.ours):
            found.setdefault(name.partition(".")[0], []).append(name)
        return {top: tuple(names) for top, names in found.items()}


@dataclass(slots=True)
class Match:
    """The wanted names, found or not. `targets` is the memory to fill, `used`: saved names that have a place here."""

    saved: SavedState
    only: tuple[str, ...] | None
    targets: list[Target] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    conflicts: list[str] = field(default_factory=list)
    _met: set[str] = field(default_factory=set)

    def wants(self, name: str) -> bool:
        """Whether `only` covers the whole of what is called `name`."""
        if self.only is None:
            return True
        covering = [entry for entry in self.only if name == entry or name.startswith(f"{entry}.")]
        self._met.update(covering)
        return bool(covering)

    def touches(self, name: str) -> bool:
        """Whether `only` covers something at or below `name`."""
        return self.wants(name) or any(entry.startswith(f"{name}.") for entry in self.only or ())

    def fill(self, target: Target) -> None:
        self.targets.append(target)
        self.used.add(target.name)

    def object(self, name: str) -> Any:
        """The stored form of the plain object `name`, and note that it is used; a conflict is noted instead."""
        self.used.add(name)
        if name in self.saved.conflicted:
            self.conflicts.append(name)
        return self.saved.ours[name]

    def check_only(self) -> None:
        """Raises ConfigError for entries of `only` that cover nothing live: a typing error would load nothing."""
        if unmet := sorted(set(self.only or ()) - self._met):
            raise ConfigError(f"only={unmet}: nothing in the live state has such a name or prefix")

    def check_conflicts(self, world: int) -> None:
        if self.conflicts:
            objects = [name for name in self.conflicts if name in self.saved.ours]
            parameters = [name for name in self.conflicts if name not in self.saved.ours]
            differ = f"differ between the {self.saved.world} ranks that saved, and {world} load"
            wrap = 'dscheck.per_rank(obj, on_reshard=callable | "first" | "drop")'
            reasons = (
                f"{shown(objects)} {differ}: wrap them in {wrap}, which says what then" if objects else "",
                f"the optimizer options of {shown(parameters)} {differ}: load on as many ranks, or load the rest with "
                "only=[...]"
                if parameters
                else "",
            )
            raise StateMismatchError("; ".join(filter(None, reasons)), names=sorted(self.conflicts))


def shown(names: Iterable[str]) -> str:
    """The first names of a list that may be long."""
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(f"'{name}'" for name in listed[:_SHOWN]) + more


def checked_only(only: Sequence[str] | None) -> tuple[str, ...] | None:
    if only is None:
        return None
    if isinstance(only, str) or not only or not all(isinstance(entry, str) and entry for entry in only):
        raise ConfigError(f"only={only!r}: a list of names or dotted prefixes of the state, such as ['model']")
    return tuple(only)
