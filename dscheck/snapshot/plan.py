"""What a capture of one structure consists of: pieces, small tensors and samples, as arrays and without any memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dscheck.errors import ConfigError
from dscheck.native import DROPPED, HOST, KEPT, PRIVATE, CaptureShape, has_cuda_driver
from dscheck.snapshot.bits import bits

SMALL_ON_DEVICE = 128 << 10
"""Up to here a device tensor is copied with all other small ones by one kernel, inside `save()`: a copy of its own
would cost more than its bytes."""

SMALL_ON_HOST = 16 << 10
UNOWNED = -1
_SLAB_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Source:
    """Live memory to capture: `view` of `locals[index]`, called `name`. `owner` is what fences it, None when nothing
    does.
    """

    name: str
    index: int
    view: torch.Tensor
    owner: Any = None


@dataclass(frozen=True, slots=True)
class Small:
    """Lies in the capture's slab. `entry`: its number among the small ones."""

    entry: int
    offset: int


@dataclass(frozen=True, slots=True)
class Pieces:
    """Lies in the region, cut into the pieces [start, stop). `dense`: shape, strides and dtype of a tensor whose bytes
    are all there, in another order than row-major.
    """

    start: int
    stop: int
    dense: tuple[tuple[int, ...], tuple[int, ...], torch.dtype] | None = None


@dataclass(frozen=True, slots=True)
class Copied:
    """A view that is no block of memory: a contiguous copy of it is taken inside `save()`."""

    index: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def take(self, local: torch.Tensor) -> torch.Tensor:
        local = local.detach()
        view = bits(local.as_strided(self.shape, self.stride, local.storage_offset() + self.offset))
        return view.contiguous() if on_lane(local.device) else view.cpu().contiguous()


def on_lane(device: torch.device) -> bool:
    """Whether memory of this device is read by native threads: the host's, and CUDA's through its driver."""
    return device.type == "cpu" or (device.type == "cuda" and torch.version.cuda is not None and has_cuda_driver())


class CapturePlan:
    """The geometry of `sources`, in the order in which they are stored; good for all later `locals` of one structure.

    `watched`: (index, view) of contiguous regions of which only a sample is wanted. `host_budget`: bytes of the region
    that the captures share; None: as large as needed. Raises ConfigError for a budget that can never work.
    """

    def __init__(
        self,
        locals: Sequence[torch.Tensor],
        sources: Sequence[Source],
        watched: Sequence[tuple[int, torch.Tensor]] = (),
        *,
        piece_bytes: int,
        block_bytes: int,
        host_budget: int | None = None,
        check: bool = False,
    ) -> None:
        self.names = [source.name for source in sources]
        self.sizes = [source.view.numel() * source.view.itemsize for source in sources]
        self.nbytes = sum(self.sizes)
        owners = _distinct(source.owner for source in sources if source.owner is not None)
        self._owners = [weakref.ref(owner) for owner in owners]
        self.check, self.block_bytes = check, block_bytes
        self._piece_bytes = _piece_bytes(piece_bytes, block_bytes, host_budget)
        self._count = len(locals)
        self.copied: list[Copied] = []
        self.layouts: list[Small | Pieces] = []
        self.piece_source: list[int] = []
        self.piece_offset: list[int] = []
        pieces, smalls = _Rows(), _Rows()
        self._slab = 0
        numbers = {id(owner): number for number, owner in enumerate(owners)}
        for number, source in enumerate(sources):
            owner = UNOWNED if source.owner is None else numbers[id(source.owner)]
            self._add(number, source, locals[source.index], owner, pieces, smalls)
        self.pieces, self.smalls = pieces.arrays(), smalls.arrays()
        self.watched = self._watch(locals, watched)
        self.devices = sorted({int(device) for device in (*self.pieces.devices, *self.smalls.devices)} - {HOST})
        self.large = np.unique(self.pieces.tensors).tolist()
        self.unowned = np.flatnonzero(self.pieces.owners == UNOWNED)
        self.versioned = [index for index in self.large if _has_version(index, locals)]
        first = {int(tensor): place for place, tensor in reversed([*enumerate(self.pieces.tensors)])}
        firsts = [first[tensor] for tensor in self.versioned]
        self.owner_of_versioned = [int(self.pieces.owners[place]) for place in firsts]
        self.name_of_versioned = [self.names[self.piece_source[place]] for place in firsts]
        self.lazy_owners = sorted({int(owner) for owner in self.pieces.owners if owner >= 0})
        self.calm = Calm(self.pieces.tensors[self.unowned], np.array(self.versioned, np.int64))
        self.shape = CaptureShape(
            self.pieces.sizes, self.pieces.devices,
            self.smalls.sizes, self.smalls.devices, np.array(self._targets(), np.uint64),
            self.watched.sizes, self.watched.devices, block_bytes, check,
        )  # fmt: skip
        self.region_bytes = self.shape.region_bytes
        self.longest = int(self.pieces.sizes.max(initial=0))

    @property
    def owners(self) -> list[Any]:
        """By the numbers that pieces have. Not kept alive: an optimizer that was replaced holds gigabytes."""
        return [owner() for owner in self._owners]

    def piece_names(self, index: int) -> str:
        """The source that a piece belongs to."""
        return self.names[self.piece_source[index]]

    def _add(self, number: int, source: Source, local: torch.Tensor, owner: int, pieces: _Rows, smalls: _Rows) -> None:
        view, size = source.view.detach(), self.sizes[number]
        tensor, delta = source.index, view.data_ptr() - local.data_ptr() if size else 0
        dense = None if view.is_contiguous() else _dense(view, source.view)
        device = _device_of(local.device)
        limit = SMALL_ON_HOST if device == HOST else SMALL_ON_DEVICE
        lane = on_lane(local.device)
        if size and (not lane or not (view.is_contiguous() or (dense is not None and size > limit))):
            tensor, delta, owner, dense = self._count + len(self.copied), 0, PRIVATE, None
            offset = int(view.storage_offset() - local.storage_offset())
            self.copied.append(Copied(source.index, tuple(view.shape), view.stride(), offset))
            device = device if lane else HOST
        if size <= limit:
            self.layouts.append(Small(len(smalls), self._slab))
            self._slab += -(-size // _SLAB_ALIGNMENT) * _SLAB_ALIGNMENT
            smalls.add(tensor, delta, size, device, owner)
            return
        start = len(pieces)
        for at in range(0, size, self._piece_bytes):
            pieces.add(tensor, delta + at, min(self._piece_bytes, size - at), device, owner)
            self.piece_source.append(number)
            self.piece_offset.append(at)
        self.layouts.append(Pieces(start, len(pieces), dense))

    def _targets(self) -> list[int]:
        return [layout.offset for layout in self.layouts if isinstance(layout, Small)]

    def _watch(self, locals: Sequence[torch.Tensor], watched: Sequence[tuple[int, torch.Tensor]]) -> Rows:
        rows = _Rows()
        for index, view in watched:
            local, size = locals[index], view.numel() * view.itemsize
            tensor, delta, device = index, view.data_ptr() - local.data_ptr() if size else 0, _device_of(local.device)
            if not view.is_contiguous() or not on_lane(local.device):
                tensor, delta = self._count + len(self.copied), 0
                offset = int(view.storage_offset() - local.storage_offset())
                self.copied.append(Copied(index, tuple(view.shape), view.stride(), offset))
                device = device if on_lane(local.device) else HOST
            rows.add(tensor, delta, size, device, PRIVATE)
        return rows.arrays()


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Where a plan's sources go in one file: byte offsets and first blocks of pieces and small tensors, as native
    threads take them. `kept`: sources that are written by the caller.
    """

    pieces: np.ndarray[Any, np.dtype[np.uint64]]
    smalls: np.ndarray[Any, np.dtype[np.uint64]]
    piece_blocks: np.ndarray[Any, np.dtype[np.uint64]]
    small_blocks: np.ndarray[Any, np.dtype[np.uint64]]
    kept: frozenset[int]

    @classmethod
    def of(cls, plan: CapturePlan, places: Mapping[int, tuple[int, int]]) -> Placement:
        """`places`: offset and first block by the number of the source; what is not there is not written."""
        offsets, blocks = np.full((2, len(plan.sizes)), DROPPED, np.uint64)
        for number, (offset, block) in places.items():
            offsets[number], blocks[number] = offset, block
        sources = np.array(plan.piece_source, np.int64)
        small = np.array([number for number, layout in enumerate(plan.layouts) if isinstance(layout, Small)], np.int64)
        permuted = [number for number in places if _is_permuted(plan.layouts[number])]
        within = np.array(plan.piece_offset, np.uint64)
        pieces, written = offsets[sources], offsets[sources] != DROPPED
        pieces[written] += within[written]
        pieces[np.isin(sources, permuted)] = KEPT
        piece_blocks = blocks[sources]
        piece_blocks[written] += within[written] // np.uint64(plan.block_bytes)
        piece_blocks[~written | (pieces == KEPT)] = DROPPED
        return cls(pieces, offsets[small], piece_blocks, blocks[small], frozenset(permuted))


def _is_permuted(layout: Small | Pieces) -> bool:
    return isinstance(layout, Pieces) and layout.dense is not None


@dataclass(frozen=True, slots=True)
class Rows:
    """Parts of tensors: which (a local, or behind them a copy), at which byte, how many, on which device, whose."""

    tensors: np.ndarray[Any, np.dtype[np.int64]]
    deltas: np.ndarray[Any, np.dtype[np.uint64]]
    sizes: np.ndarray[Any, np.dtype[np.uint64]]
    devices: np.ndarray[Any, np.dtype[np.int32]]
    owners: np.ndarray[Any, np.dtype[np.int32]]

    def addresses(self, pointers: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """Where they begin, given the first byte of each tensor."""
        addresses: np.ndarray[Any, np.dtype[np.uint64]] = pointers[self.tensors] + self.deltas
        return addresses


class Calm:
    """Which of the pieces that nobody fences were the same at the last two captures: they are taken for frozen, and
    captured lazily under the guards, all pieces of a tensor or none. The others are captured, or spilled, before
    `save()` returns, and so is for good what has changed while it was taken for frozen.
    """

    def __init__(
        self, tensors: np.ndarray[Any, np.dtype[np.int64]], versioned: np.ndarray[Any, np.dtype[np.int64]]
    ) -> None:
        self.places = np.searchsorted(versioned, tensors)
        self.places[~np.isin(tensors, versioned)] = len(versioned)  # a column that never moves
        self._tensors, self._moved = tensors, np.zeros(len(tensors), np.bool_)
        self._seen: tuple[np.ndarray[Any, Any], list[bytes], np.ndarray[Any, Any]] | None = None

    def __call__(self, versions: Sequence[int]) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """By piece, given the versions of now."""
        seen = self._seen
        if seen is None:
            return np.zeros(len(self.places), np.bool_)
        calm: np.ndarray[Any, np.dtype[np.bool_]] = seen[2] & (np.array([*versions, 0])[self.places] == seen[0])
        return calm & ~self._moved

    def distrust(self, tensor: int) -> None:
        """It changed while it was taken for frozen: it is never again."""
        self._moved |= self._tensors == tensor

    def note(self, versions: Sequence[int], samples: list[bytes]) -> None:
        """What a whole capture saw."""
        now, last = np.array([*versions, 0])[self.places], self._seen
        same = np.zeros(len(self.places), np.bool_)
        if last is not None:
            same = (now == last[0]) & np.array([one == other for one, other in zip(samples, last[1], strict=True)])
            same &= ~np.isin(self._tensors, self._tensors[~same])  # samples see a change of few rows in few pieces
        self._seen = (now, samples, same)


class _Rows:
    def __init__(self) -> None:
        self._rows: list[tuple[int, int, int, int, int]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, tensor: int, delta: int, size: int, device: int, owner: int) -> None:
        self._rows.append((tensor, delta, size, device, owner))

    def arrays(self) -> Rows:
        columns = list(zip(*self._rows, strict=True)) or [()] * 5
        kinds = (np.int64, np.uint64, np.uint64, np.int32, np.int32)
        return Rows(*(np.array(column, kind) for column, kind in zip(columns, kinds, strict=True)))


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list({id(value): value for value in values}.values())


def _device_of(device: torch.device) -> int:
    return HOST if device.type == "cpu" else (device.index or 0)


def _has_version(index: int, locals: Sequence[torch.Tensor]) -> bool:
    return index < len(locals) and not locals[index].is_inference()


def _dense(view: torch.Tensor, source: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype] | None:
    """Of a permuted tensor without gaps; None for others. All its bytes lie in one block from its first one on."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(view.stride(), view.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return None
            expected *= size
    return tuple(view.shape), view.stride(), source.dtype


def _piece_bytes(wanted: int, block_bytes: int, budget: int | None) -> int:
    """A multiple of the block, so that checksums of pieces are those of blocks; several pieces fit into the budget."""
    if budget is not None and budget < 2 * block_bytes:
        raise ConfigError(
            f"host_memory_bytes={budget}: a capture needs room for two blocks of {block_bytes} bytes, "
            f"{2 * block_bytes}, at least"
        )
    most = wanted if budget is None else min(wanted, budget // 4)
    return max(most // block_bytes, 1) * block_bytes
