"""One capture: the state of the moment of `save()`, on its way into host memory while training goes on."""

from __future__ import annotations

import operator
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from dscheck.errors import DeadlineError, DscheckError, TornSnapshotError
from dscheck.native import (
    FROZEN,
    HOST,
    VOLATILE,
    Copier,
    NativeCapture,
    checksums,
    collect,
    crc32c_blocks,
    matches,
    piece_sample,
    sample,
    times,
    watched_sample,
)
from dscheck.snapshot.bits import bits
from dscheck.snapshot.plan import CapturePlan, Pieces, Placement, Small

SETTLE_S = 10.0
"""How long copies under way may take to end once their capture is given up."""

_VERSION = operator.attrgetter("_version")

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Contiguous bytes of one fragment, and the CRC32C of each of their blocks."""

    data: Bytes
    checksums: np.ndarray[Any, np.dtype[np.uint32]]

    @classmethod
    def of(cls, data: Bytes, block_bytes: int) -> Chunk:
        return cls(data, crc32c_blocks(data.data, block_bytes))


@dataclass(frozen=True, slots=True)
class Span:
    """One stretch of work for the trace, in seconds of `time.monotonic()`."""

    track: str
    name: str
    began: float
    ended: float
    nbytes: int = 0


class Capture:
    """The bytes of a plan's sources as of its construction (invariant C11), or the reason why they are not.

    `chunks` and `wait` are for the background, `fence` for the training thread. Three guards refuse a snapshot that
    training changed: step counts of owners, version counters, and samples of each piece taken at `save()`, as captured
    and live behind the last copy. Errors: TornSnapshotError, DeadlineError, what `fail` was given.
    """

    def __init__(
        self,
        copier: Copier,
        native: NativeCapture,
        plan: CapturePlan,
        count: Callable[[Any], int],
        owners: Sequence[Any],
        versions: Sequence[int],
        volatile: frozenset[int],
        locals: Sequence[torch.Tensor],
        lazy: Sequence[torch.UntypedStorage],
        addresses: Sequence[int],
        kept: Any,
        deadline: float,
    ) -> None:
        self._copier, self._native, self._plan, self._count = copier, native, plan, count
        self._steps, self._versions, self._deadline = list(map(count, owners)), versions, deadline
        self._volatile = volatile
        self._kept = kept  # until all is copied: what is freed before would be memory of something else
        self._lazy, self._addresses = lazy, addresses
        self._versioned = [locals[index] for index in plan.versioned]
        self._owners = owners
        self._numbers = {id(owner): number for number, owner in enumerate(owners)}
        self._fenced: set[int] = set()
        self._told_free = False
        self._error: Exception | None = None
        self._proving = threading.Lock()
        self._proved = self._slab_there = False
        self.nbytes = plan.nbytes
        self.host_memory_s = 0.0
        self._fence_s = 0.0
        self.fences: list[Span] = []

    @property
    def fence_s(self) -> float:
        """Seconds that fences held up training: the CPU, and, known once the capture is released, the device."""
        return self._fence_s + self._native.stalled_s

    @property
    def spans(self) -> list[Span]:
        """The copies and fences so far."""
        found = list(self.fences)
        writes = []
        for index, (device, spilled, nbytes, began, ended, put, stored) in enumerate(times(self._native)):
            if ended:
                track = "capture host" if device == HOST else f"capture device {device}"
                how = " (spilled)" if spilled else ""
                found.append(Span(track, self._plan.piece_names(index) + how, began, ended, nbytes))
            if stored:
                writes.append(Span("write", self._plan.piece_names(index), put, stored, nbytes))
        return found + _side_by_side(writes)

    def fence(self, owner: Any | None = None) -> None:
        """Return when everything of `owner` (all owners: None) may change. Never raises: what fails here fails the
        save.
        """
        number = FROZEN if owner is None else self._numbers.get(id(owner))
        self._told_free = self._told_free or owner is None
        if number is None or number in self._fenced or FROZEN in self._fenced:
            return
        began, has_room = time.monotonic(), self.has_room
        try:
            self._refuse_changed(None if number == FROZEN else number)
            self._fenced.add(number)
            self._hold_back(number)
        except Exception as error:
            self.fail(error)
        finally:
            ended = time.monotonic()
            if has_room:
                self._fence_s += ended - began
            else:
                self.host_memory_s += ended - began
            self.fences.append(Span("fences", "fence", began, ended))

    def hold(self) -> None:
        """Return when what nobody fences and anybody may change (EMA copies, weights that forward rewrites) may change.

        For the training thread, before `save()` returns and after the background has the capture: memory that is
        smaller than it is handed on from there. Never raises.
        """
        if not self._volatile:
            return
        began = time.monotonic()
        try:
            self._hold_back(VOLATILE)
        except Exception as error:
            self.fail(error)
        self.host_memory_s += time.monotonic() - began

    def _hold_back(self, number: int) -> None:
        streams = [(device, torch.cuda.current_stream(device).cuda_stream) for device in self._plan.devices]
        if not self._copier.fence(self._native, number, streams, self._deadline):
            raise self._late()

    def fail(self, error: Exception) -> None:
        """Refuse this snapshot; the first reason counts."""
        if not isinstance(error, DscheckError):
            error = TornSnapshotError(f"the capture failed: {type(error).__name__}: {error}", tensor=None)
        self._error = self._error or error
        self._copier.fail(self._native, str(error))

    def wait(self) -> None:
        """Return when all is captured and proved to be of one moment."""
        if not self._copier.wait(self._native, self._deadline):
            raise self._late()
        with self._proving:
            if not self._proved:
                self._raise_failure()
                self._refuse_changed(None)
                self._refuse_freed()
                self._raise_failure()
                plan = self._plan
                if len(plan.unowned):
                    plan.calm.note(self._versions, [piece_sample(self._native, int(i)) for i in plan.unowned])
                self._proved = True
                self._let_go()

    def chunks(self, index: int) -> Iterator[Chunk]:
        """The bytes of source `index`, in order; each chunk but the last a multiple of the block. Waits for them.

        A chunk's memory is given back when the next one is asked for. Sources are consumed in order, by one thread.
        """
        for chunk, free in self.lent(index):
            yield chunk
            free()

    def lent(self, index: int) -> Iterator[tuple[Chunk, Callable[[], None]]]:
        """`chunks` whose memory is given back by a call, from any thread: also after the next one was asked for, which
        may wait for that memory unless `has_room`.
        """
        layout = self._plan.layouts[index]
        if isinstance(layout, Small):
            self._await_slab()
            data = self._copier.slab(self._native, layout.offset, self._plan.sizes[index])
            self._check(len(self._plan.piece_source) + layout.entry, data)
            yield Chunk.of(data, self._plan.block_bytes), _keep
        elif layout.dense is None:
            yield from self._runs(layout)
        else:
            yield Chunk.of(self._in_order(layout, self._plan.sizes[index]), self._plan.block_bytes), _keep

    @property
    def has_room(self) -> bool:
        """Whether every piece has its place in the region, so that none waits for another one's memory."""
        return self._native.placed == len(self._plan.piece_source)

    @property
    def hashed(self) -> bool:
        """Whether each source is compared with a hash of its moment as it is consumed: by `chunks` only."""
        return self._plan.check

    def write(self, file: int, placement: Placement, room: int, *, direct: bool, slice_bytes: int) -> None:
        """Let native threads write all sources to their places in `file`, a descriptor, as they are captured, and free
        them. Instead of `chunks`, which is left for what `placement` keeps.

        room: bytes of the file that are asked of the disk at once. Raises OSError.
        """
        error = self._copier.write(
            self._native, file, direct, slice_bytes, room,
            placement.pieces, placement.smalls, placement.piece_blocks, placement.small_blocks,
        )  # fmt: skip
        if error:
            raise OSError(error, os.strerror(error))

    def await_written(self, blocks: np.ndarray[Any, np.dtype[np.uint32]]) -> bool:
        """Return when all of it is in the file, with the CRC32C of each of the file's `blocks` that it has filled.

        False: all is captured, and the deadline has passed. Raises OSError of a write, else as `wait` does.
        """
        done, error = self._copier.await_written(self._native, self._deadline)
        if done:
            collect(self._native, blocks)
            return True
        self._raise_failure()
        if error:
            raise OSError(error, os.strerror(error))
        if not self._native.captured_s:
            raise self._late()
        return False

    def sample(self, index: int) -> bytes:
        """256 bytes of watched region `index`, as of construction."""
        self._await_slab()
        return watched_sample(self._native, index)

    def late(
        self,
        name: str,
        view: torch.Tensor,
        region: torch.Tensor,
        before: bytes,
        owner: Any,
        steps: int,
        version: int | None,
    ) -> Chunk:
        """Capture `view`, part of `region`, now, as of the moment of construction.

        For a rank that learns only from the plan that it writes it. `before` is the sample of `region` of that moment,
        `steps` and `version` the counts. Raises TornSnapshotError unless all of them stand, and nobody was told that
        the state may change.
        """
        data, after = _on_host(view), sample(_on_host(region))
        counted = owner is not None and self._count(owner) == steps
        if self._told_free or not counted or _version(view) != version or before != after:
            raise _torn(name, "this rank learned too late that it is the writer of it")
        return Chunk.of(data, self._plan.block_bytes)

    def release(self) -> bool:
        """Give back whatever is left of it. False: a copy hangs, or its end cannot be known, and its memory cannot be
        used again.
        """
        try:
            settled = self._copier.release(self._native, time.monotonic() + SETTLE_S)
        except RuntimeError:  # of the driver, which says no more of any copy
            settled = False
        if settled:
            self._let_go()
        return settled

    def _let_go(self) -> None:
        """Nothing reads the live memory any more."""
        self._kept, self._lazy, self._versioned = None, (), []

    def _await_slab(self) -> None:
        if not self._slab_there and not self._copier.await_slab(self._native, self._deadline):
            raise self._late()
        self._slab_there = True

    def _runs(self, layout: Pieces) -> Iterator[tuple[Chunk, Callable[[], None]]]:
        """Pieces that lie side by side are taken together: each return from native code may wait 5 ms for the GIL."""
        first = layout.start
        while first < layout.stop:
            count = self._copier.await_run(self._native, first, layout.stop, self._deadline)
            if not count:
                raise self._late()
            data = self._copier.run(self._native, first, count)
            self._check_run(first, count, data)
            free = partial(self._copier.free_run, self._native, first, count)
            yield Chunk(data, np.frombuffer(checksums(self._native, first, count), np.uint32)), free
            first += count

    def _check_run(self, first: int, count: int, data: Bytes) -> None:
        at = 0
        for piece in range(first, first + count if self._plan.check else first):
            size = int(self._plan.pieces.sizes[piece])
            self._check(piece, data[at : at + size])
            at += size

    def _in_order(self, layout: Pieces, nbytes: int) -> Bytes:
        """A permuted tensor in row-major order."""
        assert layout.dense is not None
        shape, stride, dtype = layout.dense
        raw, at = torch.empty(nbytes, dtype=torch.uint8), 0
        for chunk, free in self._runs(layout):
            raw.numpy()[at : at + len(chunk.data)] = chunk.data
            at += len(chunk.data)
            free()
        return _on_host(raw.view(dtype).as_strided(shape, stride))

    def _check(self, entry: int, data: Bytes) -> None:
        """In the debug mode, all bytes against the hash that was taken of them at `save()`."""
        if self._plan.check and not matches(self._native, entry, data):
            pieces = len(self._plan.piece_source)
            name = self._plan.piece_names(entry) if entry < pieces else f"small tensor {entry - pieces}"
            error = _torn(name, "what was captured has another hash than what was live at save()")
            self.fail(error)
            raise error

    def _refuse_changed(self, number: int | None) -> None:
        """Raise if an owner has stepped, or a version moved, before its fence. None: all that no fence has passed."""
        if FROZEN in self._fenced:
            return
        plan = self._plan
        for which in plan.lazy_owners:
            stepped = self._count(self._owners[which]) != self._steps[which]
            if stepped and number in (None, which) and which not in self._fenced:
                raise _torn(_first(plan, which), "its optimizer stepped before it was captured")
        versions = versions_of(self._versioned)
        if versions == self._versions or not self._versioned:
            return
        for place, (now, then) in enumerate(zip(versions, self._versions, strict=True)):
            owner = plan.owner_of_versioned[place]
            watched = number in (None, owner) and owner not in self._fenced and place not in self._volatile
            if now != then and watched:
                plan.calm.distrust(plan.versioned[place])
                raise _torn(plan.name_of_versioned[place], "it was written to before it was captured")

    def _refuse_freed(self) -> None:
        """Holding a storage does not keep its bytes from `resize_(0)`, as code that moves a model aside may call it."""
        if not self._fenced and list(map(torch.UntypedStorage.data_ptr, self._lazy)) != self._addresses:
            raise _torn(self._plan.names[0], "memory of this state was freed before it was captured")

    def _raise_failure(self) -> None:
        if self._error is not None:
            raise self._error
        torn = self._copier.torn(self._native)
        if torn is not None:
            self._plan.calm.distrust(int(self._plan.pieces.tensors[torn]))
            raise _torn(self._plan.piece_names(torn), "its values changed between save() and the end of its capture")
        failure = self._copier.failure(self._native)
        if failure:
            raise DscheckError(f"the capture failed: {failure}")

    def _late(self) -> Exception:
        try:
            self._raise_failure()
        except Exception as error:
            return error
        index = self._copier.pending(self._native)
        name = "small tensors" if index is None else self._plan.piece_names(index)
        late = DeadlineError(f"tensor '{name}' was not captured in time", phase="capture", waited_for=name)
        self.fail(late)
        return late


def versions_of(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Their version counters; -1 for one that has none, made under inference_mode in the place of one that had."""
    try:
        return list(map(_VERSION, tensors))
    except RuntimeError:
        return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _on_host(view: torch.Tensor) -> Bytes:
    """The bytes of a view, row-major."""
    plain = bits(view).cpu().contiguous()
    data: Bytes = plain.view(-1).view(torch.uint8).numpy() if plain.numel() else np.empty(0, np.uint8)
    return data


def _keep() -> None:
    """What stays as long as its capture needs no giving back."""


def _first(plan: CapturePlan, owner: int) -> str:
    found = np.flatnonzero(plan.pieces.owners == owner)
    return plan.piece_names(int(found[0])) if len(found) else "a small tensor"


def _torn(name: str, why: str) -> TornSnapshotError:
    return TornSnapshotError(
        f"tensor '{name}': {why}, so the snapshot is not the state of one moment; the save is refused. "
        "Call `ckpt.fence()` before anything but an optimizer step changes the state",
        tensor=name,
    )


def _side_by_side(spans: Iterable[Span]) -> list[Span]:
    """Spans that overlap, on tracks of their own."""
    ends: list[float] = []
    found = []
    for span in sorted(spans, key=lambda span: span.began):
        free = next((number for number, end in enumerate(ends) if end <= span.began), len(ends))
        ends[free : free + 1] = [span.ended]
        found.append(replace(span, track=f"{span.track} {free + 1}"))
    return found
