"""Fences that install themselves: before an optimizer steps or a state dict is loaded, what it changes is captured."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable
from typing import Any

import torch

from dscheck.snapshot.capture import Capture


class Fences:
    """The hooks of one Checkpointer on optimizers and modules, and the captures they hold back for.

    A hook never raises and never leaves training without its step: what fails inside fails the capture (C8).
    """

    def __init__(self) -> None:
        self._steps: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._modules: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self._handles: list[Any] = []
        self._capture: Capture | None = None

    def watch(self, optimizers: Iterable[torch.optim.Optimizer], modules: Iterable[torch.nn.Module] = ()) -> None:
        """Install the hooks on those that have none yet."""
        for optimizer in optimizers:
            if optimizer not in self._steps:
                self._steps[optimizer] = 0
                self._handles.append(optimizer.register_step_pre_hook(self._before_step))
                self._handles.append(optimizer.register_load_state_dict_pre_hook(self._before_optimizer_load))
        for module in modules:
            if module not in self._modules:
                self._modules.add(module)
                hook = module.register_load_state_dict_pre_hook(self._before_module_load)  # type: ignore[no-untyped-call]
                self._handles.append(hook)

    def guard(self, capture: Capture | None) -> None:
        """Hold back for `capture` from now on; None when it is over."""
        self._capture = capture

    def steps(self, optimizer: Any) -> int:
        """How often `optimizer` has begun a step, or a load, since it is watched."""
        return self._steps[optimizer]

    def fence(self) -> None:
        """Return when every captured tensor may change: everything pending is copied, or enqueued ahead of the
        caller.
        """
        if self._capture is not None:
            self._capture.fence()

    def remove(self) -> None:
        """Take all hooks off. Idempotent."""
        for handle in self._handles:
            with contextlib.suppress(Exception):
                handle.remove()
        self._handles.clear()

    def _before_step(self, optimizer: Any, args: Any = None, kwargs: Any = None) -> None:
        capture = self._capture
        if capture is not None:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                capture.fail(
                    RuntimeError("a CUDA graph was recorded during a save: call ckpt.fence() before recording")
                )
            else:
                capture.fence(optimizer)
        self._steps[optimizer] = self._steps.get(optimizer, 0) + 1

    def _before_optimizer_load(self, optimizer: Any, state_dict: Any) -> None:
        self._before_step(optimizer)

    def _before_module_load(self, *args: Any) -> None:
        self.fence()
