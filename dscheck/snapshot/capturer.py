"""The memory and the threads that all captures of one rank share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dscheck.config import Settings
from dscheck.errors import ConfigError, DscheckError
from dscheck.native import FROZEN, USABLE_WINDOW, VOLATILE, Copier
from dscheck.snapshot.capture import Capture, versions_of
from dscheck.snapshot.plan import UNOWNED, CapturePlan, Source


class Capturer:
    """Takes captures. Everything is ready ahead of time where `prepare` was called; else the first one waits for it.

    The host region holds what two captures take, or `host_memory_bytes`, whatever is less, and grows up to that budget
    when more of them are under way. All methods are for the training thread but `close`.
    """

    def __init__(self, settings: Settings, steps: Callable[[Any], int]) -> None:
        self._settings, self._steps = settings, steps
        device_budget = settings.device_memory_bytes
        self._copier = Copier(
            settings.copy_threads, settings.io_threads, None if device_budget == "auto" else device_budget
        )
        self._spill = device_budget != 0
        self._prepared: CapturePlan | None = None
        self._sized = False
        self._addresses: Addresses | None = None
        self.window_hint_s = 0.0
        """Seconds from the end of an optimizer step to the next one on the device, until captures have measured it."""

    def plan(
        self,
        locals: Sequence[torch.Tensor],
        sources: Sequence[Source],
        watched: Sequence[tuple[int, torch.Tensor]] = (),
    ) -> CapturePlan:
        """The plan of a structure under the budget. Raises ConfigError for a budget that can never work."""
        settings = self._settings
        budget = None if settings.host_memory_bytes == "auto" else settings.host_memory_bytes
        return CapturePlan(
            locals, sources, watched,
            piece_bytes=settings.piece_bytes, block_bytes=settings.block_bytes,
            host_budget=budget, check=settings.check_capture,
        )  # fmt: skip

    def prepare(self, plan: CapturePlan) -> None:
        """Get host and device memory ready in the background. Raises ConfigError when the machine cannot have it."""
        try:
            self._copier.prepare(self._share(plan), plan.devices, self._excess(plan))
        except MemoryError as error:
            raise ConfigError(
                f"{self._share(plan)} bytes of address space for captures are not to be had: lower host_memory_bytes"
            ) from error
        self._prepared = plan
        self._sized = self._window(plan) > 0

    def room(self, plan: CapturePlan) -> bool:
        """Whether all pieces would find their place now, with no wait for earlier captures to be written."""
        if self._copier.has_room(plan.region_bytes, plan.longest):
            return True
        if self._copier.asked + plan.region_bytes <= self._budget(plan):
            self._copier.prepare(self._copier.asked + plan.region_bytes, plan.devices, 0)
            return True
        # Less than one capture's size: it passes through, and never fits whole.
        if plan.region_bytes > self._budget(plan) and self._copier.has_room(0, 0):
            return True
        self._copier.hurry()
        return False

    def take(
        self, plan: CapturePlan, locals: Sequence[torch.Tensor], deadline: float, memory: object = None
    ) -> Capture:
        """The state of this moment, up to `Capture.hold`, which must follow.

        `memory`: the same object as at an earlier call where all of `locals` lie where they lay; None: unknown.
        """
        short = self._copier.usable < self._copier.asked  # on its way, or refused to an earlier save: asked for again
        if plan is not self._prepared or short or (self._spill and plan.devices and not self._sized):
            self.prepare(plan)
        copies = [copied.take(locals[copied.index]) for copied in plan.copied]
        tensors = [*locals, *copies]
        held = [torch.Tensor.untyped_storage(tensors[index]) for index in plan.large]
        addresses = self._addresses
        if (
            memory is None
            or copies
            or addresses is None
            or addresses.memory is not memory
            or addresses.plan is not plan
        ):
            self._addresses = addresses = Addresses.of(memory, plan, tensors, held)
        versions = versions_of([locals[index] for index in plan.versioned])
        owners, volatile = plan.pieces.owners, frozenset[int]()
        lazy, starts = held, addresses.storages
        if len(plan.unowned):
            calm, owners = plan.calm(versions), owners.copy()
            owners[plan.unowned] = np.where(calm, FROZEN, VOLATILE)
            volatile = frozenset(plan.calm.places[~calm].tolist())
            changing = set(plan.pieces.tensors[plan.unowned[~calm]].tolist())
            kept = [place for place, index in enumerate(plan.large) if index not in changing]
            lazy, starts = [held[place] for place in kept], [starts[place] for place in kept]
        try:
            native = self._copier.take(
                plan.shape, addresses.pieces, owners, addresses.smalls, addresses.watched, _streams(plan.devices),
                self.window_hint_s,
            )  # fmt: skip
        except RuntimeError as error:
            raise DscheckError(f"the capture could not begin: {error}") from error
        return Capture(
            self._copier, native, plan, self._steps, plan.owners, versions, volatile, locals,
            lazy, starts, (held, copies), deadline,
        )  # fmt: skip

    def close(self) -> None:
        """End the threads and give all memory back, once no capture uses it any more."""
        del self._copier

    def _budget(self, plan: CapturePlan) -> int:
        budget = self._settings.host_memory_bytes
        return plan.region_bytes if budget == "auto" else budget

    def _share(self, plan: CapturePlan) -> int:
        return min(2 * plan.region_bytes + plan.longest, self._budget(plan))

    def _window(self, plan: CapturePlan) -> float:
        """Seconds that a lazy capture has before the first fence; 0: not known yet."""
        return self._copier.rate_and_window(plan.devices[0])[1] or self.window_hint_s if plan.devices else 0.0

    def _excess(self, plan: CapturePlan) -> int:
        """Most bytes that cannot leave one of the devices before its fence, so far as that is known."""
        window = self._window(plan)
        if not self._spill or not window:
            return 0
        excess = [0]
        for device in plan.devices:
            here = plan.pieces.devices == device
            unowned = int(plan.pieces.sizes[here & (plan.pieces.owners == UNOWNED)].sum())
            rate = self._copier.rate_and_window(device)[0]
            excess += [unowned, int(plan.pieces.sizes[here].sum() - USABLE_WINDOW * rate * window)]
        return max(excess)


@dataclass(frozen=True, slots=True, eq=False)
class Addresses:
    """Where what a plan captures lies, and the storages of its large tensors, as long as `memory` is the same."""

    memory: object
    plan: CapturePlan
    pieces: np.ndarray[Any, np.dtype[np.uint64]]
    smalls: np.ndarray[Any, np.dtype[np.uint64]]
    watched: np.ndarray[Any, np.dtype[np.uint64]]
    storages: list[int]

    @classmethod
    def of(
        cls, memory: object, plan: CapturePlan, tensors: Sequence[torch.Tensor], held: Sequence[torch.UntypedStorage]
    ) -> Addresses:
        pointers = np.fromiter(map(torch.Tensor.data_ptr, tensors), np.uint64, len(tensors))
        pieces, smalls, watched = (rows.addresses(pointers) for rows in (plan.pieces, plan.smalls, plan.watched))
        return cls(memory, plan, pieces, smalls, watched, list(map(torch.UntypedStorage.data_ptr, held)))


def _streams(devices: Sequence[int]) -> list[tuple[int, int]]:
    return [(device, torch.cuda.current_stream(device).cuda_stream) for device in devices]
