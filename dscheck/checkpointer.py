"""What a user holds: `Checkpointer` ties the live state, the ranks and a storage together, and knows nothing else."""

from __future__ import annotations

import contextlib
import logging
import math
import numbers
import os
import platform
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch

import dscheck
from dscheck.commit import History, read_history
from dscheck.commit.listing import LOOKS
from dscheck.commit.tiered import Node, read_tiers
from dscheck.config import Settings
from dscheck.errors import (
    CheckpointExistsError,
    ConfigError,
    DscheckError,
    RankFailureError,
    UnusableStateError,
)
from dscheck.load.loader import Decision, Loader, Request
from dscheck.load.report import LoadReport
from dscheck.load.wire import open_wire
from dscheck.manifest.keys import LARGEST
from dscheck.manifest.record import Record
from dscheck.ranks import open_ranks
from dscheck.ranks.base import Ranks
from dscheck.save.coordinator import Lineage
from dscheck.save.handle import SaveHandle, SaveStats
from dscheck.save.ledger import Ledger
from dscheck.save.retainer import RetentionStats
from dscheck.save.saver import Saver
from dscheck.snapshot import Fences
from dscheck.state import LiveState
from dscheck.state.leaf import FlatState, TensorLeaf
from dscheck.storage import Root, open_tiers
from dscheck.tuning import tuned

log = logging.getLogger("dscheck")

__all__ = ["Checkpointer", "LoadReport", "RetentionStats", "SaveHandle", "SaveStats"]

MOST_METRICS, LONGEST_METRIC = 100, 100
"""Metrics of one save, and characters of a name: a record is one small read."""


class Checkpointer:
    """Saves and loads one mapping of live state below one root, or two tiers of it.

    `root`: a path, a URL that dscheck, a plug-in or fsspec serves (docs/storage.md), or a Storage; or two of them, the
    faster tier first, and the shared one to which it is uploaded (docs/tiers.md); `Tier(root, node_local=True)` is one
    of each node's own. `storage_options` go to what opens a URL, of two the shared one, and are shown nowhere. `state`:
    names to modules, optimizers, anything with `state_dict` and `load_state_dict`, tensors, DTensors, generators and
    plain data, nested; held by reference, read at every save, written back in place by load. Settings: see
    `dscheck.config.Settings`; the defaults are those that `dscheck probe` stored for the root, if it did. `ranks`
    replaces the ranks of the default process group, for tests.

    Construction and `load` are collective, on the main thread; `save` is called on all ranks with the same steps.
    Several saves may be under way. Leaving `with` cleanly waits for all of them; by an exception it tells the other
    ranks and does not wait. So does a process that ends without `close`. Raises ConfigError,
    StorageError and what reading a damaged root raises.
    """

    def __init__(
        self,
        root: Root | Sequence[Root],
        state: Mapping[str, Any],
        *,
        storage_options: Mapping[str, Any] | None = None,
        ranks: Ranks | None = None,
        **settings: Any,
    ) -> None:
        checked = _settings(settings)
        if not isinstance(state, Mapping):
            raise ConfigError(f"the state is a mapping of names to what is to be saved, not a {type(state).__name__}")
        self.tiers = open_tiers(root, storage_options)
        self.storage = self.tiers.near
        tuning = tuned(self.storage)
        self.settings = replace(checked, **({} if tuning is None else tuning.settings) | settings)
        self.state = state
        self._ranks = ranks or open_ranks(
            self.settings.timeout_s, host=self.settings.store_host, port=self.settings.store_port
        )
        self._wire = open_wire() if ranks is None else None
        self._fences = Fences()
        self._loads = 0
        self._unusable: str | None = None
        self._mixed: frozenset[str] | None = frozenset()
        """What a load that failed half way was to load: these names, or None for all."""
        self._ledger = Ledger()
        self._saving = threading.Lock()
        self._watched: list[TensorLeaf] | None = None
        self._closed, self._process = False, os.getpid()
        self.loaded: LoadReport | None = None
        try:
            self._live = LiveState(state, rank=self._ranks.rank, world=self._ranks.size, rng=self.settings.rng)
            self._saver = Saver(self.tiers, self._ranks, self.settings, self._fences, _versions())
            self._start()
            self._watch_early()
        except BaseException:
            self._fences.remove()
            self._ranks.close()
            raise

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(abort=error is not None)

    def save(self, step: int, metrics: Mapping[str, float] | None = None) -> SaveHandle:
        """Start to save the state of this moment as `step`, and return at once.

        `metrics` are numbers by name that the step's record carries, for `Keep(by=...)` and `dscheck ls`; those of
        rank 0 count.

        Earlier saves may still be under way. It waits for them only where the capture finds no room, or where the ranks
        have not agreed yet on a plan for a state of this structure; the handle's statistics say how long.
        Raises what is wrong with the call or the state, before anything is captured, and then tells the other ranks:
        ConfigError (a step that does not exceed the last one, those under way included; metrics that are no numbers),
        StateError (what cannot be
        stored plainly, by path), CheckpointExistsError, UnusableStateError; with `on_failure="raise"` also the first
        error of an earlier save that was not raised yet. Any later fault shows on the handle and in a warning, and
        leaves the last committed step as it was (C8).
        """
        if not self._saving.acquire(blocking=False):
            raise ConfigError(
                f"save({step!r}) while another thread is in save(): call it from the training thread alone"
            )
        try:
            return self._save(step, metrics)
        finally:
            self._saving.release()

    def _save(self, step: int, metrics: Mapping[str, float] | None) -> SaveHandle:
        began = time.monotonic()
        self._refuse_closed("save")
        self._saver.tidy()
        if self._saver.superseded is not None:
            return self._saver.decline(step, self._saver.superseded)
        try:
            self._check_step(step)
            checked = _metrics(metrics)
            self._raise_untold()
            flat = self._live.flatten()
            self._watch(flat)
        except Exception as error:
            self._saver.refuse(step, error)
            raise
        handle = self._saver.save(step, flat, began, checked)
        self._ledger.add(handle)
        return handle

    def load(
        self,
        step: int | None = None,
        only: Sequence[str] | None = None,
        strict: bool = True,
        convert_dtype: bool = False,
    ) -> int | None:
        """Make the live state what it was at `step` (None: the newest committed one), in place, resharded.

        Returns the step; None when None was asked and there is none: a fresh run. `only`: names of the state, or dotted
        prefixes, to load alone. `strict=False` loads what there is and reports the rest in `loaded`. Tensors whose
        dtype differs are refused unless `convert_dtype`. Should the newest step be deleted while it is loaded, the load
        starts again on the newest one of then. All ranks load the same step or all raise:
        CheckpointNotFoundError, CorruptCheckpointError, StateMismatchError, IncompleteCoverError, StateError,
        RankFailureError, DeadlineError. An error after the first byte was placed leaves the state unusable: `save`
        refuses until a load succeeds.
        """
        self._refuse_closed("load")
        self._fences.fence()
        self._saver.drain()
        loader = self._new_loader()
        try:
            request = _request(step, only, strict, convert_dtype)
        except ConfigError as error:
            loader.refuse("decide", error)
            raise
        decision, record = self._load(loader, request)
        if record is None:
            return None
        if request.only is None or (self._mixed is not None and self._mixed <= {*request.only}):
            self._unusable, self._mixed = None, frozenset()
        self._ledger.restart(record.step)
        self._saver.continue_from(_lineage(decision, (record.term, record.step)))
        return record.step

    def _new_loader(self) -> Loader:
        self._loads += 1
        return Loader(self.tiers, self._ranks, self.settings, self._live, self._loads, self._wire)

    def _load(self, loader: Loader, request: Request) -> tuple[Decision, Record | None]:
        """What was decided and loaded: the newest step of then, should the one before it vanish. On all ranks alike."""
        vanished: DscheckError | None = None
        for _ in range(LOOKS):
            decision = loader.decide(request)
            if decision.record is None:
                break
            try:
                self.loaded = loader.load(request, decision.record, decision.tiers, self._saver.upload)
                return decision, decision.record
            except BaseException as error:
                if loader.touched:
                    self._unusable = f"the load of step {decision.record.step} failed half way: {error}"
                    self._mixed = None if self._mixed is None or request.only is None else self._mixed | {*request.only}
                if not loader.vanished or request.step is not None or not isinstance(error, DscheckError):
                    raise
                log.warning("%s; loading the newest step of now instead", error)
                vanished, loader = error, self._new_loader()
        if vanished is not None:
            raise vanished
        return decision, None

    def steps(self) -> list[int]:
        """The committed steps of the live history, ascending, as the storage shows them now. Not collective.

        Of a near tier of each node's own nothing counts here, since one rank cannot tell what the other nodes hold.
        """
        return [ref.step for ref in self._history().visible]

    def latest(self) -> int | None:
        """The newest committed step, or None. Not collective."""
        newest = self._history().newest
        return None if newest is None else newest.step

    @property
    def retention(self) -> RetentionStats:
        """What `keep` has deleted so far, and what went wrong; on rank 0, elsewhere nothing."""
        return self._saver.retainer.stats

    def _history(self) -> History:
        near, shared = self.tiers.near, self.tiers.shared
        if shared is None or self.tiers.node_local:
            return read_history(shared or near)
        return read_tiers(near, shared, [Node.look(near)])[0]

    def fence(self) -> None:
        """Return when the state may be changed by other means than an optimizer step: EMA swaps, clamping,
        rollbacks.
        """
        self._fences.fence()

    def close(self, *, abort: bool = False) -> None:
        """Wait for all saves (`abort`: give them up and tell the others), and let go of hooks, threads and ranks."""
        if self._closed:
            return
        self._closed = True
        if abort:
            self._refuse_loads()
        self._saver.close(abort=abort)
        self._fences.remove()
        self._ranks.close()
        if not abort:
            self._raise_untold()

    def _refuse_loads(self) -> None:
        """No rank waits in its next load for this one, which has left."""
        loader = Loader(self.tiers, self._ranks, self.settings, self._live, self._loads + 1)
        loader.refuse("decide", RankFailureError("training ended by an exception", ranks=[self._ranks.rank]))

    def _start(self) -> None:
        """Rank 0 looks at the root and tells all what it saw."""
        loader = Loader(self.tiers, self._ranks, self.settings, self._live, 0)
        seen = loader.look()
        self._has_commits = seen.record is not None
        self._saver.continue_from(_lineage(seen, None))

    def _watch(self, flat: FlatState) -> None:
        """Fence what steps and loads the state; only a state of new structure has something new to watch."""
        if flat.tensors is not self._watched:
            self._fences.watch({leaf.owner for leaf in flat.tensors if leaf.owner is not None}, _modules(self.state))
            self._watched = flat.tensors
        else:  # a module may have given way to its like
            self._fences.watch((), [value for value in self.state.values() if isinstance(value, torch.nn.Module)])

    def _watch_early(self) -> None:
        """Hear of the first steps, so that memory is ready before the first save."""
        with contextlib.suppress(DscheckError):  # what is wrong with the state, save() says
            self._fences.watch([found.inner for found in self._live.survey().optimizers], _modules(self.state))
        self._fences.on_first_steps(self._prepare)

    def _prepare(self) -> None:
        """Every optimizer has stepped: the state has its shape, and the memory to capture it can be made ready."""
        try:
            flat = self._live.flatten()
            self._watch(flat)
            self._saver.prepare(flat)
        except Exception as error:
            log.debug("the first save will prepare itself: %s", error)  # and says there what is wrong

    def _check_step(self, step: int) -> None:
        _check_number(step)
        if self._unusable is not None:
            raise UnusableStateError(f"{self._unusable}. The live state is a mixture: load a step before saving")
        self._ledger.settle()
        self._ledger.check(step)
        if self._has_commits and self.loaded is None and self._ledger.newest is None and not self.settings.fresh:
            raise CheckpointExistsError(
                f"{self.storage.url} has committed steps and this job has loaded none of them: call load() first, "
                "choose another root, or pass fresh=True to start a new history there"
            )

    def _raise_untold(self) -> None:
        self._ledger.settle()
        if self.settings.on_failure == "raise":
            self._ledger.raise_untold()

    def _refuse_closed(self, call: str) -> None:
        if self._closed:
            raise ConfigError(f"{call}() on a Checkpointer that is closed")
        if os.getpid() != self._process:
            raise ConfigError(f"{call}() in a forked process: the Checkpointer belongs to process {self._process}")


def _check_number(step: Any) -> None:
    if type(step) is not int or not 0 <= step <= LARGEST:
        raise ConfigError(f"step {step!r}: expected an int from 0 to {LARGEST}")


def _metrics(given: Any) -> dict[str, float | None]:
    """The numbers by name, None for what is not finite. Raises ConfigError."""
    if given is None:
        return {}
    if not isinstance(given, Mapping) or len(given) > MOST_METRICS:
        raise ConfigError(
            f"metrics={given!r}: expected at most {MOST_METRICS} numbers by name, such as {{'loss': 0.3}}"
        )
    for name, value in given.items():
        if type(name) is not str or not 0 < len(name) <= LONGEST_METRIC:
            raise ConfigError(f"metrics: the name {name!r}: expected a text of 1 to {LONGEST_METRIC} characters")
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ConfigError(
                f"metrics: {name}={value!r}: expected a number (`.item()` of a tensor waits for its device)"
            )
    return {name: float(value) if math.isfinite(value) else None for name, value in given.items()}


def _request(step: int | None, only: Sequence[str] | None, strict: bool, convert_dtype: bool) -> Request:
    if step is not None:
        _check_number(step)
    if isinstance(only, str) or (only is not None and not all(isinstance(name, str) for name in only)):
        raise ConfigError(f"only={only!r}: expected a list of names or dotted prefixes, such as ['model']")
    return Request(step, None if only is None else tuple(only), bool(strict), bool(convert_dtype))


def _modules(state: Mapping[Any, Any]) -> Iterator[torch.nn.Module]:
    for value in state.values():
        if isinstance(value, torch.nn.Module):
            yield value
        elif isinstance(value, Mapping):
            yield from _modules(value)
        elif isinstance(value, list | tuple):
            yield from _modules(dict(enumerate(value)))


def _settings(given: Mapping[str, Any]) -> Settings:
    unknown = [name for name in given if name not in Settings.__dataclass_fields__]
    if unknown:
        raise ConfigError(f"unknown setting {', '.join(unknown)}: known are {', '.join(Settings.__dataclass_fields__)}")
    return Settings(**given)


def _lineage(decision: Decision, parent: tuple[int, int] | None) -> Lineage:
    return Lineage(decision.newest_term, parent, decision.run)


def _versions() -> dict[str, str]:
    return {"dscheck": dscheck.__version__, "torch": str(torch.__version__), "python": platform.python_version()}
