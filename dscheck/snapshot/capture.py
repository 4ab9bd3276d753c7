"""One capture: what is owned by an optimizer is copied lazily, up to its fence; the rest before `save()` returns."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from dscheck.errors import DeadlineError, DscheckError, TornSnapshotError
from dscheck.snapshot.arena import Arena
from dscheck.snapshot.bits import bits, on_host, sample


@dataclass(frozen=True, slots=True)
class Source:
    """Live memory to capture: `view` of the tensor called `name`. `owner` is what fences it, None when nothing does."""

    name: str
    view: torch.Tensor
    owner: Any = None


class _Phase(Enum):
    PENDING = 0
    TAKEN = 1
    COPIED = 2  # enqueued, on an accelerator


@dataclass(slots=True, eq=False)
class _Piece:
    """A bounded part of one source, and what proves that it did not change before it was copied."""

    name: str
    live: torch.Tensor
    host: torch.Tensor
    owner: Any
    steps: int
    version: int | None
    before: torch.Tensor
    after: torch.Tensor | None = None
    phase: _Phase = _Phase.PENDING


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


class Lanes:
    """A side stream for each accelerator, so that copies run beside the training step. Host tensors need none."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.Stream] = {}

    def follow(self, device: torch.device) -> None:
        """Order the lane of `device` after all that the calling thread has enqueued there."""
        if device.type != "cpu":
            if device not in self._streams:
                self._streams[device] = torch.Stream(device)
            self._streams[device].wait_stream(torch.accelerator.current_stream(device))

    @contextlib.contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        if device.type == "cpu":
            yield
        else:
            with self._streams[device]:
                yield

    def hold_back(self, device: torch.device) -> None:
        """Make the calling thread's current stream wait for all that the lane holds; the CPU goes on."""
        if device.type != "cpu":
            torch.accelerator.current_stream(device).wait_event(self._streams[device].record_event())

    def drain(self, device: torch.device, deadline: float) -> None:
        """Return when the lane is empty. Raises DeadlineError past `deadline`."""
        if device.type == "cpu":
            return
        event = self._streams[device].record_event()
        while not event.query():
            if time.monotonic() > deadline:
                raise DeadlineError(
                    f"copies from {device} did not end in time", phase="capture", waited_for=str(device)
                )
            time.sleep(0.0005)


class Capture:
    """The snapshot of `sources` at the moment of construction (invariant C11).

    Construction copies the sources without an owner and samples the others; `run` copies those in the background;
    `fence(owner)` copies, on the calling thread, what is left of one owner. `steps` counts the steps of an owner: a
    piece that is copied under another count than it started with is torn. After `run` returned, `data(i)` are the
    bytes of source i, row-major, valid until the arena is carved again. Errors: TornSnapshotError, DeadlineError.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        arena: Arena,
        lanes: Lanes,
        steps: Callable[[Any], int],
        *,
        piece_bytes: int,
        deadline: float,
        devices: Iterable[torch.device] = (),
    ) -> None:
        self._lanes, self._steps, self._deadline, self._piece_bytes = lanes, steps, deadline, piece_bytes
        self._changed = threading.Condition()
        self._error: DscheckError | None = None
        self._names = [source.name for source in sources]
        self._released = False
        self.fence_s = 0.0
        views = [bits(source.view) for source in sources]
        self._devices = {view.device for view in views} | set(devices)
        pinned = any(device.type == "cuda" for device in self._devices)
        self._data = arena.carve([view.numel() * view.itemsize for view in views], pinned=pinned)
        for device in self._devices:
            lanes.follow(device)
        self._pieces: list[_Piece] = []
        for source, view, memory in zip(sources, views, self._data, strict=True):
            host = on_host(memory, view)
            if source.owner is None:
                host.copy_(view, non_blocking=True)
            else:
                self._pieces += [self._piece(source, live, part) for live, part in _cut(view, host, piece_bytes)]
        self._pending = {id(piece.owner) for piece in self._pieces}
        for device in self._devices:
            lanes.follow(device)  # what was just enqueued on the current stream is drained with the lane

    def _piece(self, source: Source, live: torch.Tensor, host: torch.Tensor) -> _Piece:
        steps = self._steps(source.owner)
        return _Piece(source.name, live, host, source.owner, steps, _version(source.view), sample(live))

    @property
    def nbytes(self) -> int:
        return sum(memory.numel() for memory in self._data)

    def data(self, index: int) -> torch.Tensor:
        """The captured bytes of one source: 1-D uint8 in host memory."""
        return self._data[index]

    def run(self) -> None:
        """Copy all that is pending and prove the whole. Raises what went wrong; the host bytes then mean nothing."""
        for piece in self._pieces:
            if self._take(piece):
                self._copy(piece)
        for device in self._devices:
            self._lanes.drain(device, self._deadline)
        self._await_copied(self._pieces)
        with self._changed:
            if self._error is not None:
                raise self._error
        for piece in self._pieces:
            self._prove(piece)
        self._pieces = []

    def fence(self, owner: Any | None = None) -> None:
        """Return when everything of `owner` (all owners: None) may change. Never raises: what fails here fails the
        save.
        """
        self._released = self._released or owner is None
        if not self._pending or (owner is not None and id(owner) not in self._pending):
            return
        began = time.perf_counter()
        try:
            pieces = [piece for piece in self._pieces if owner is None or piece.owner is owner]
            for piece in pieces:
                if self._take(piece):
                    self._copy(piece)
            self._await_copied(pieces)
            for device in {piece.live.device for piece in pieces}:
                self._lanes.hold_back(device)
            self._pending = set() if owner is None else self._pending - {id(owner)}
        except Exception as error:
            self.fail(error)
        finally:
            self.fence_s += time.perf_counter() - began

    def fail(self, error: Exception) -> None:
        """Refuse this snapshot; the first reason counts."""
        if not isinstance(error, DscheckError):
            error = TornSnapshotError(f"the capture failed: {type(error).__name__}: {error}", tensor=None)
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def _take(self, piece: _Piece) -> bool:
        with self._changed:
            if piece.phase is not _Phase.PENDING or self._error is not None:
                return False
            piece.phase = _Phase.TAKEN
            return True

    def _copy(self, piece: _Piece) -> None:
        try:
            with self._lanes.on(piece.live.device):
                piece.host.copy_(piece.live, non_blocking=True)
                piece.after = sample(piece.live)
            if self._steps(piece.owner) != piece.steps:
                raise _torn(piece.name, "its optimizer stepped before it was captured")
            if _version(piece.live) != piece.version:
                raise _torn(piece.name, "it was written to before it was captured")
        except Exception as error:
            self.fail(error)
        with self._changed:
            piece.phase = _Phase.COPIED
            self._changed.notify_all()

    def _await_copied(self, pieces: Sequence[_Piece]) -> None:
        with self._changed:
            done = self._changed.wait_for(
                lambda: self._error is not None or all(piece.phase is _Phase.COPIED for piece in pieces),
                timeout=max(0.0, self._deadline - time.monotonic()),
            )
        if not done:
            left = next(piece.name for piece in pieces if piece.phase is not _Phase.COPIED)
            raise DeadlineError(f"tensor '{left}' was not captured in time", phase="capture", waited_for=left)

    def _prove(self, piece: _Piece) -> None:
        assert piece.after is not None
        before, after, captured = piece.before.cpu(), piece.after.cpu(), sample(piece.host)
        if not torch.equal(before, captured) or not torch.equal(captured, after):
            raise _torn(piece.name, "its values changed between save() and the end of its capture")

    def late(
        self, source: Source, region: torch.Tensor, before: torch.Tensor, steps: int, version: int | None
    ) -> torch.Tensor:
        """Capture one more source now, on the calling thread, as of the moment of construction.

        For a rank that learns only from the plan that it writes `source`, part of `region`, of which `before` is the
        sample of that moment, `steps` and `version` the counts. Raises TornSnapshotError unless all of them stand, and
        nobody was told that the state may change.
        """
        view = bits(source.view)
        memory = torch.empty(view.numel() * view.itemsize, dtype=torch.uint8)
        self._lanes.follow(view.device)
        with self._lanes.on(view.device):
            on_host(memory, view).copy_(view)
            after = sample(bits(region)).cpu()
        counted = self._steps(source.owner) == steps if source.owner is not None else False
        if self._released or not counted or _version(source.view) != version or not torch.equal(before.cpu(), after):
            raise _torn(source.name, "this rank learned too late that it is the writer of it")
        return memory


def _torn(name: str, why: str) -> TornSnapshotError:
    return TornSnapshotError(
        f"tensor '{name}': {why}, so the snapshot is not the state of one moment; the save is refused. "
        "Call `ckpt.fence()` before anything but an optimizer step changes the state",
        tensor=name,
    )


def _cut(live: torch.Tensor, host: torch.Tensor, piece_bytes: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The two views in step, cut into parts of at most `piece_bytes` where the first dimension allows."""
    if live.is_contiguous():
        live, host = live.view(-1), host.view(-1)
    if live.ndim == 0 or live.numel() * live.itemsize <= piece_bytes:
        yield live, host
        return
    rows = max(1, piece_bytes // (live[0].numel() * live.itemsize))
    yield from zip(torch.split(live, rows), torch.split(host, rows), strict=True)
