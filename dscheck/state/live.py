"""The live state as a whole: flattened for a save, and prepared for a load that fills it in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dscheck.errors import ConfigError
from dscheck.manifest.objects import Later, encode_object
from dscheck.state import rng as streams
from dscheck.state.flattening import Flattening
from dscheck.state.leaf import FlatState
from dscheck.state.restore import Restore, prepare
from dscheck.state.saved import SavedState, SavedTensor
from dscheck.state.structure import Structure
from dscheck.state.survey import Survey, survey
from dscheck.state.watch import watched

__all__ = ["LiveState", "Restore", "SavedState", "SavedTensor"]


class LiveState:
    """The user's mapping, held by reference and read anew each time: what is put into it later is part of the state."""

    def __init__(self, mapping: Mapping[str, Any], *, rank: int, world: int, rng: bool = True) -> None:
        if not isinstance(mapping, Mapping):
            raise ConfigError(f"the state is a mapping of names to what is to be saved, not a {type(mapping).__name__}")
        if not 0 <= rank < world:
            raise ConfigError(f"rank {rank} is not one of {world} ranks")
        self.mapping, self.rank, self.world, self.rng = mapping, rank, world, rng
        self._structure: Structure | None = None

    def survey(self) -> Survey:
        """Names, tensors, optimizers and objects as they are now. Raises StateError for what cannot be stored."""
        return survey(self.mapping, self.rank)

    def flatten(self) -> FlatState:
        """The state at this moment: tensors as views of live memory, all else as values that cannot change any more.

        `tensors` is the list of the last time as long as the structure is the same: names, cuts and owners, and how the
        tensors lie in memory. No collective, no optimizer step, nothing resharded. Raises StateError by path.
        """
        # Random streams come first: a state_dict of the user's may draw from them.
        mine: dict[str, Any] = {streams.KEY: _later(streams.capture())} if self.rng else {}
        flat = FlatState(mine={**mine})
        if self._structure is not None and self._structure.flatten(flat):
            return flat
        return self._surveyed(FlatState(mine=mine))

    def _surveyed(self, flat: FlatState) -> FlatState:
        """The state by a walk over all of it, which the next one is spared if it is the same then."""
        before, self._structure = self._structure, None
        found = self.survey()
        writing = Flattening(found, flat, self.rank)
        constant = writing.everything()
        roots = None if writing.is_fleeting else watched(self, self.mapping, found)
        self._structure = now = Structure.of(flat, found, roots, constant)
        if before is not None and now.is_like(before):
            flat.tensors = before.tensors
            self._structure = replace(now, tensors=before.tensors)
        return flat

    def prepare(self, saved: SavedState, only: Sequence[str] | None = None, strict: bool = True) -> Restore:
        """See `Restore`. Touches nothing live."""
        return prepare(self.survey(), saved, rank=self.rank, world=self.world, rng=self.rng, only=only, strict=strict)


def _later(described: Callable[[], dict[str, Any]]) -> Later:
    return Later(lambda: encode_object(described(), streams.KEY))
