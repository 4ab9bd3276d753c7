"""One save on one rank: what it holds, captures and writes, from `save()` to the commit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dscheck.errors import TornSnapshotError
from dscheck.layout.region import Region
from dscheck.manifest.bundle import Options
from dscheck.manifest.objects import encode_objects
from dscheck.save.coordinator import Coordinator
from dscheck.save.fragments import Fragments, Layout
from dscheck.save.handle import SaveHandle
from dscheck.save.shares import Box, Shares
from dscheck.save.trace import Trace
from dscheck.save.write import Objects
from dscheck.snapshot import Capture, Chunk, Fences, Span
from dscheck.state.leaf import FlatState


@dataclass(frozen=True, slots=True)
class Counts:
    """By what a later capture tells that nothing changed: steps of each owner by identity, versions of each local."""

    locals: Sequence[torch.Tensor]
    steps: Mapping[int, int]
    versions: Sequence[int | None]


@dataclass(slots=True)
class Moment:
    """The state as of one `save()`, without its tensors' bytes.

    `counts` is None where nothing can be captured late: on one rank, and once the plan was answered.
    """

    shares: Shares
    ours: Mapping[str, Any]
    mine: Mapping[str, Any]
    options: Options
    counts: Counts | None

    @classmethod
    def of(cls, flat: FlatState, shares: Shares, fences: Fences) -> Moment:
        counts = None
        if shares.watched:
            steps = {id(owner): fences.steps(owner) for owner in shares.holdings.owners()}
            versions = [None if local.is_inference() else local._version for local in flat.locals]
            counts = Counts(flat.locals, steps, versions)
        return cls(shares, flat.ours, flat.mine, flat.options, counts)

    def objects(self) -> Objects:
        """The texts of the plain objects: what is in them cannot change any more, so that this may run at any time."""
        return Objects(encode_objects(self.ours, self.options), encode_objects(self.mine))


@dataclass(slots=True, eq=False)
class Attempt:
    """One call of `save()` on this rank.

    `number` counts the calls and keys the rounds. `error`: it failed in the call; `told`: and was raised there.
    `metrics`: for the record; those of rank 0 count. `coordinator`: of rank 0 at that time. `busy`: it only says that
    this rank skips. `spans`: of its capture, once it has ended. `planned`: the plan of its round has been answered;
    `keeping`: and the arrival, where each node publishes the record. `await_uploads`: what the coordinator calls before
    a claim.
    """

    number: int
    step: int
    handle: SaveHandle
    coordinator: Coordinator
    trace: Trace
    moment: Moment | None = None
    capture: Capture | None = None
    error: Exception | None = None
    told: bool = False
    busy: bool = False
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    exchanging: bool = False
    planned: bool = False
    keeping: bool = False
    await_uploads: Callable[[], None] = lambda: None
    late: dict[tuple[str, Region], Chunk] = field(default_factory=dict)
    _joined: list[str] = field(default_factory=list)
    _owing: set[str] = field(default_factory=lambda: {"copies", "late"})
    _ended: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def ended(self) -> bool:
        return self._ended

    def end(self) -> bool:
        """Whether this call ended it: the first one does, and what its thread still does no longer counts."""
        with self._lock:
            first, self._ended = not self._ended, True
            return first

    def join(self, phase: str) -> bool:
        """Note that this rank enters a round, unless the attempt was given up; whether it may."""
        with self._lock:
            if not self._ended:
                self._joined.append(phase)
            return not self._ended

    def untold(self) -> str | None:
        """The round in which the others wait for this rank and have not heard of it, entered by this; or None."""
        with self._lock:
            phase = "plan" if not self._joined else None
            if self.planned and self._joined == ["plan"]:
                phase = "arrive"
            if self.keeping and self._joined == ["plan", "arrive"]:
                phase = "kept"
            self._joined += [phase] if phase else []
            return phase

    def settle(self, part: str) -> None:
        """`part` is done, "copies" or "late": when both are, the live tensors may change."""
        with self._lock:
            self._owing.discard(part)
            captured = not self._owing
        if captured:
            self.handle.captured()

    def write_trace(self, url: str) -> None:
        error = self.handle.error
        outcome = "committed" if error is None else f"{type(error).__name__}: {error}"
        self.trace.write(self.spans, {"root": url, "step": self.step, "outcome": outcome})

    def catch_up(self, boxes: Iterable[Box]) -> None:
        """Capture what the plan made this rank the writer of only after `save()`. Raises TornSnapshotError."""
        assert self.capture is not None
        assert self.moment is not None
        shares, counts = self.moment.shares, self.moment.counts
        sampled = {key: number for number, key in enumerate(shares.watched)}
        for box in boxes:
            if box.key in shares.sources:
                continue
            held = box.held
            if counts is None or held.key not in sampled:
                raise _too_late(box)
            self.late[box.key] = self.capture.late(
                str(box),
                held.view_of(box.region, counts.locals),
                held.view(counts.locals),
                self.capture.sample(sampled[held.key]),
                held.owner,
                counts.steps.get(id(held.owner), 0),
                counts.versions[held.index],
            )
        self.moment.counts = None

    def fragments(self, layout: Layout) -> Fragments:
        """What it writes; `catch_up` comes first."""
        assert self.capture is not None
        return Fragments(layout, self.capture, self.late, self.trace)


def _too_late(box: Box) -> TornSnapshotError:
    return TornSnapshotError(
        f"tensor '{box}': the plan of this save made this rank its writer, which had neither captured nor sampled it: "
        "another rank changed what it holds; this save is refused, the next one captures it",
        tensor=box.held.claim.name,
    )
