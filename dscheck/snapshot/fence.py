"""Fences that install themselves: before an optimizer steps or a state dict is loaded, what it changes is captured."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

from dscheck.snapshot.capture import Capture

WINDOWS = 2


class Fences:
    """The hooks of one Checkpointer on optimizers and modules, and the captures they hold back for.

    A hook never raises and never leaves training without its step: what fails inside fails the capture (C8).
    `window_s`: seconds on the device from the end of an optimizer step to the next one, 0 until it is known: what a
    lazy capture has at its disposal.
    """

    def __init__(self) -> None:
        self._steps: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._modules: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self._handles: list[Any] = []
        self._captures: tuple[Capture, ...] = ()
        self._changing = threading.Lock()  # saves end on another thread than they begin on
        self._process = os.getpid()
        self._first_steps: Callable[[], None] | None = None
        self._window_known: Callable[[], None] | None = None
        self._windows: list[float] = []
        self._stepped: weakref.WeakSet[Any] = weakref.WeakSet()
        self._marks: list[torch.Event] = []
        self._marked: int | None = None
        self.window_s = 0.0

    def watch(self, optimizers: Iterable[torch.optim.Optimizer], modules: Iterable[torch.nn.Module] = ()) -> None:
        """Install the hooks on those that have none yet."""
        for optimizer in optimizers:
            if optimizer not in self._steps:
                self._steps[optimizer] = 0
                # A compiled step would compile the hooks as well, and what they call, anew for each kind of save.
                before = torch.compiler.disable(self._before_step)  # type: ignore[no-untyped-call]
                after = torch.compiler.disable(self._after_step)  # type: ignore[no-untyped-call]
                self._handles.append(optimizer.register_step_pre_hook(before))
                self._handles.append(optimizer.register_step_post_hook(after))
                self._handles.append(optimizer.register_load_state_dict_pre_hook(self._before_optimizer_load))
        for module in modules:
            if module not in self._modules:
                self._modules.add(module)
                hook = module.register_load_state_dict_pre_hook(self._before_module_load)  # type: ignore[no-untyped-call]
                self._handles.append(hook)

    def on_first_steps(self, callback: Callable[[], None]) -> None:
        """Call `callback` on the training thread when each watched optimizer has stepped for the first time, since
        their state exists then (TRAPS 22), and once more when `window_s` is known.
        """
        self._first_steps = self._window_known = callback

    def guard(self, capture: Capture | None) -> None:
        """Hold back for `capture` as well, until it is released."""
        if capture is not None:
            with self._changing:
                self._captures = (*self._captures, capture)

    def release(self, capture: Capture | None) -> None:
        """It is over: nothing waits for it any more."""
        with self._changing:
            self._captures = tuple(one for one in self._captures if one is not capture)

    def steps(self, optimizer: Any) -> int:
        """How often `optimizer` has begun a step, or a load, since it is watched."""
        return self._steps[optimizer]

    def fence(self) -> None:
        """Return when every captured tensor may change: everything pending is copied, or enqueued ahead of the
        caller.
        """
        for capture in self._captures if self._at_home() else ():
            capture.fence()

    def remove(self) -> None:
        """Take all hooks off. Idempotent."""
        for handle in self._handles:
            with contextlib.suppress(Exception):
                handle.remove()
        self._handles.clear()

    def _before_step(self, optimizer: Any, args: Any = None, kwargs: Any = None) -> None:
        if not self._at_home():
            return
        captures = self._captures
        if captures and _records_graph():
            reason = RuntimeError("a CUDA graph was recorded during a save: call ckpt.fence() before recording")
            for capture in captures:
                capture.fail(reason)
        else:
            for capture in captures:
                capture.fence(optimizer)
        if self.window_s == 0.0 and len(self._marks) == 1 and self._marked == id(optimizer):
            self._mark()
        self._steps[optimizer] = self._steps.get(optimizer, 0) + 1

    def _after_step(self, optimizer: Any, args: Any = None, kwargs: Any = None) -> None:
        with contextlib.suppress(Exception):
            if not self._at_home():
                return
            if self._first_steps is not None:
                self._stepped.add(optimizer)
                if all(known in self._stepped for known in self._steps):
                    callback, self._first_steps = self._first_steps, None
                    callback()
            if self.window_s == 0.0 and self._marked in (None, id(optimizer)):
                self._marked = id(optimizer)
                self._measure()

    def _at_home(self) -> bool:
        """Not in a forked process: it steps copies of its own, lacks the threads to wait for, and shares the region."""
        return os.getpid() == self._process

    def _mark(self) -> None:
        """Remember where the training stream is."""
        with contextlib.suppress(Exception):
            if _uses_cuda() and not _records_graph():
                self._marks.append(torch.Event("cuda", enable_timing=True))
                self._marks[-1].record()

    def _measure(self) -> None:
        """Windows as they pass on the device, until there are enough: the first ones may be long, with warming up."""
        if len(self._marks) == 2:
            if not self._marks[1].query():
                return
            self._windows.append(self._marks[0].elapsed_time(self._marks[1]) * 1e-3)
        self._marks.clear()
        if len(self._windows) < WINDOWS:
            self._mark()
            return
        self.window_s = min(self._windows)
        if self._window_known is not None:
            self._window_known()

    def _before_optimizer_load(self, optimizer: Any, state_dict: Any) -> None:
        self._before_step(optimizer)

    def _before_module_load(self, *args: Any) -> None:
        self.fence()


def _uses_cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _records_graph() -> bool:
    return _uses_cuda() and torch.cuda.is_current_stream_capturing()
