"""A checkpoint that is only a dict: what save and load do with a flattened state, without storage."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dscheck.layout.region import Region
from dscheck.manifest.later import make_now
from dscheck.state import FlatState, LiveState, Part, Restore, SavedState, SavedTensor
from dscheck.state.tensors import torch_dtype


@dataclass
class Checkpoint:
    """The whole tensors by name, and the objects of each rank."""

    tensors: dict[str, torch.Tensor]
    aliases: dict[str, str]
    flats: list[FlatState]

    def seen_by(self, rank: int, world: int) -> SavedState:
        """As the load room describes it to one of `world` ranks."""
        rows = {
            name: SavedTensor(str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in self.tensors.items()
        }
        tied = {alias: SavedTensor(rows[name].dtype, rows[name].shape, name) for alias, name in self.aliases.items()}
        ours, conflicted = {}, set()
        for flat in self.flats:
            for path, value in flat.ours.items():
                if ours.setdefault(path, value) != value:
                    conflicted.add(path)
        if world == len(self.flats):
            ours, conflicted = {**ours, **self.flats[rank].ours}, set()
        options: dict[str, dict[str, Any]] = {}
        for flat in self.flats:
            for optimizer, parameters in flat.options.items():
                options.setdefault(optimizer, {}).update(parameters)
        mine = [flat.mine for flat in self.flats]
        return SavedState({**rows, **tied}, ours, frozenset(conflicted), mine.__getitem__, options, len(self.flats))


def save(states: Mapping[str, Any] | Sequence[FlatState], **settings: Any) -> Checkpoint:
    """Copy the bytes of one process, or of the flattened states of several ranks, in rank order."""
    flats = [LiveState(states, rank=0, world=1, **settings).flatten()] if isinstance(states, Mapping) else list(states)
    tensors: dict[str, torch.Tensor] = {}
    written: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    for rank, flat in enumerate(flats):
        for leaf, local in zip(flat.tensors, flat.locals, strict=True):
            shape = leaf.cut.shape
            whole = tensors.setdefault(leaf.name, zeros(shape, torch_dtype(leaf.dtype)))
            count = written.setdefault(leaf.name, torch.zeros(shape, dtype=torch.int32))
            assert tuple(whole.shape) == shape
            aliases.update(dict.fromkeys(leaf.aliases, leaf.name))
            if leaf.cut.holders and rank == leaf.cut.holders[0]:
                _copy(leaf.cut.parts(local), whole, count)
    holes = [name for name, count in written.items() if count.numel() and count.min() < 1]
    assert not holes, f"not covered: {holes}"
    return Checkpoint(tensors, aliases, [FlatState([], [], *_as_text(flat), flat.mesh) for flat in flats])


def _as_text(flat: FlatState) -> list[Any]:
    """Objects and options as they come back from storage."""
    written = json.dumps([flat.ours, flat.mine, flat.options], allow_nan=False, default=make_now)
    read: list[Any] = json.loads(written)
    return read


def parts(flat: FlatState) -> dict[str, tuple[Part, ...]]:
    """The regions that this rank holds of each tensor, with their live views."""
    return {leaf.name: leaf.cut.parts(local) for leaf, local in zip(flat.tensors, flat.locals, strict=True)}


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """torch.zeros, for the dtypes too that it does not know."""
    tensor = torch.empty(shape, dtype=dtype)
    tensor.untyped_storage().fill_(0)
    return tensor


def _copy(parts: Sequence[Part], whole: torch.Tensor, count: torch.Tensor) -> None:
    for part in parts:
        assert tuple(part.view.shape) == part.region.shape
        assert part.region.numel
        assert type(part.view) is torch.Tensor
        assert not part.view.is_conj()
        assert not part.view.is_neg()
        assert not part.view.requires_grad
        _at(whole, part.region).copy_(part.view)
        _at(count, part.region).add_(1)


def _at(whole: torch.Tensor, region: Region) -> torch.Tensor:
    return whole[region.slices()] if whole.ndim else whole


def load(
    checkpoint: Checkpoint,
    state: Mapping[str, Any],
    *,
    only: Sequence[str] | None = None,
    strict: bool = True,
    rng: bool = True,
    rank: int = 0,
    world: int = 1,
) -> tuple[Restore, str]:
    """Prepare, fill and finish. Returns the restore and how the random streams came back."""
    restore = LiveState(state, rank=rank, world=world, rng=rng).prepare(checkpoint.seen_by(rank, world), only, strict)
    for leaf in restore.tensors:
        whole = checkpoint.tensors[checkpoint.aliases.get(leaf.name, leaf.name)]
        assert leaf.shape == tuple(whole.shape), f"{leaf.name}: {leaf.shape} here, {tuple(whole.shape)} saved"
        assert torch_dtype(leaf.dtype) is whole.dtype, f"{leaf.name}: {leaf.dtype} here, {whole.dtype} saved"
        for part in leaf.parts:
            part.view.copy_(_at(whole, part.region))
    return restore, restore.finish()
