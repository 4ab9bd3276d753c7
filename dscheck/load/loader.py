"""A load is one decision, one proof that nothing will be missing, and one agreement at the end (C6)."""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, NoReturn, TypeVar

import numpy as np
import torch

from dscheck.commit import History, StepRef, read_history
from dscheck.commit.contents import Contents
from dscheck.commit.listing import read_deletion, read_step
from dscheck.commit.tiered import UNREADABLE, Nearest, Node, read_tiers
from dscheck.config import Settings
from dscheck.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    DeadlineError,
    DscheckError,
    RankFailureError,
    StateMismatchError,
    StepVanishedError,
    StorageError,
)
from dscheck.load.counted import Counted
from dscheck.load.fill import Filling, Split, split
from dscheck.load.index import HostIndex
from dscheck.load.mail import NeighbourFailedError, NeighbourLateError
from dscheck.load.needs import Needs, needs_of
from dscheck.load.read import Checksums
from dscheck.load.report import LoadReport
from dscheck.load.saved import saved_state
from dscheck.load.wire import Wire
from dscheck.manifest.keys import record_key
from dscheck.manifest.record import Record, decode_record
from dscheck.ranks.base import Failed, Ok, Ranks
from dscheck.ranks.message import pack, unpack
from dscheck.state.leaf import Target
from dscheck.state.live import LiveState, Restore
from dscheck.storage import Tiers
from dscheck.storage.base import Storage

log = logging.getLogger("dscheck")

T = TypeVar("T")

AGREEMENT_S, AGREEMENT_PART = 5.0, 0.1
"""What an agreement takes, and at most which part of the time that is left."""

LISTED = 10
"""How many names an error shows before it only counts the rest."""


NEAR_FAULTS = (CorruptCheckpointError, CheckpointNotFoundError, StorageError)
"""What a copy of a step that is damaged, not whole or out of reach raises: another tier may still have it."""


@dataclass(frozen=True, slots=True)
class Request:
    """The arguments of one load: they must be the same on all ranks."""

    step: int | None
    only: tuple[str, ...] | None
    strict: bool
    convert_dtype: bool


@dataclass(frozen=True, slots=True)
class Decision:
    """What rank 0 saw and chose for all: the record to load or None, the newest term there is, the root's run id, and
    the tiers that hold the step, by number, nearest first.
    """

    record: Record | None
    newest_term: int
    run: str | None
    tiers: tuple[int, ...]


class _Prepared(NamedTuple):
    contents: Contents
    restore: Restore
    needs: Needs
    checksums: Checksums
    received: int


class _Place(NamedTuple):
    """Where one try of a load reads."""

    storage: Storage
    wire: Wire | None
    uploaded_first: bool = False

    def __str__(self) -> str:
        return f"from {self.storage.url}" + ", after its upload to the shared tier," * self.uploaded_first


class Loader:
    """One load on one rank: `decide`, then `load`.

    `touched` tells whether live memory has been written to; `vanished`, the same on all ranks once `load` has raised,
    whether that was because the step was deleted meanwhile.
    """

    def __init__(
        self,
        tiers: Tiers,
        ranks: Ranks,
        settings: Settings,
        live: LiveState,
        number: int,
        wire: Wire | None = None,
    ) -> None:
        """Without a `wire` each rank reads all that it wants."""
        self._tiers, self._ranks, self._settings, self._live = tiers, ranks, settings, live
        self._round, self._wire = f"load-{number}", wire
        self.vanished: bool
        self._next: str | None
        """The round in which the other ranks will wait for this one; None: it has ended, and the load with it."""
        self._use(tiers.near)
        self._began = self._since = time.monotonic()
        self._phase_s: dict[str, float] = {}
        self._loading: Record | None = None
        self._deadline = self._began + settings.timeout_s
        self.touched = False

    def look(self) -> Decision:
        """What rank 0 sees in the root, told to all; its record is the newest one. Collective."""
        return self._decision(self._exchange("look", Ok(self._seen_near()), lambda posts: self._see(None, posts)))

    def decide(self, request: Request) -> Decision:
        """One rank resolves the step and tells all. Collective."""
        mine = {"step": request.step, "only": request.only, "strict": request.strict, "convert": request.convert_dtype}
        post = pack({"request": mine, "near": self._seen_near().decode("latin-1")})
        return self._decision(self._exchange("decide", Ok(post), lambda posts: self._choose(request, posts)))

    def _decision(self, text: bytes) -> Decision:
        answer = unpack(text)
        record = None
        if answer["record"] is not None:
            found = decode_record(answer["record"].encode(), record_key(answer["step"], answer["term"]))
            assert isinstance(found, Record)
            record = found
        return Decision(record, answer["newest_term"], answer["run"], tuple(answer["tiers"]))

    def load(
        self, request: Request, record: Record, tiers: Sequence[int], upload: Callable[[int], None] | None = None
    ) -> LoadReport:
        """Load `record` into the live state, from the first of these tiers from which all ranks can.

        `upload` brings a step that lies on the nodes' own disks alone to the shared tier, for ranks that want what
        another node has written. Collective: returns on all ranks or raises on all.
        """
        self._loading = record
        places, base = self._places(tiers), self._round
        for number, place in enumerate(places):
            self._round = base if not number else f"{base}.{number}"
            if place.uploaded_first:
                assert upload is not None
                upload(record.step)
                self._deadline = time.monotonic() + self._settings.timeout_s
            self._use(place.storage, self._index.nbytes)
            try:
                return self._run(request, record, place.wire)
            except DscheckError as error:
                if number + 1 == len(places) or not self._goes_on(error):
                    raise
                self._warn(
                    f"step {record.step}: not all ranks could load it from {place.storage.url}, and it is loaded "
                    f"{places[number + 1]} instead: {error}"
                )
        raise AssertionError("a step lies in one tier at least")

    def _places(self, tiers: Sequence[int]) -> list[_Place]:
        near, shared = self._tiers.near, self._tiers.shared
        if shared is None:
            return [_Place(near, self._wire)]
        if not self._tiers.node_local or 0 not in tiers:
            return [_Place(self._tiers.storages[tier], self._wire) for tier in tiers]
        both = _Place(Nearest(near, shared), self._wire, uploaded_first=1 not in tiers)
        # Alone, a node can neither read nor pass on but what its own ranks have written.
        alone = [_Place(near, None)] if both.uploaded_first else []
        return [*alone, both, _Place(shared, self._wire)]

    def _use(self, storage: Storage, nbytes: int = 0) -> None:
        """Read from this one, after `nbytes` of others."""
        self._storage, self._index, self._next, self.vanished = storage, Counted(storage, nbytes), None, False

    def _goes_on(self, error: DscheckError) -> bool:
        """Whether all ranks try the next tier: one met damage or a fault of this one, and nothing else went wrong."""
        kind = "storage" if isinstance(error, NEAR_FAULTS) else "told" if isinstance(error, RankFailureError) else "no"

        def decide(posts: Sequence[bytes]) -> bytes:
            kinds = {unpack(post) for post in posts}
            return pack("storage" in kinds and "no" not in kinds)

        try:
            return bool(unpack(self._exchange("fallback", Ok(pack(kind)), decide)))
        except DscheckError:
            return False

    def _run(self, request: Request, record: Record, wire: Wire | None) -> LoadReport:
        prepared = self._prepare_with_all(request, record, wire)
        index_read = self._index.nbytes
        answer = self._exchange("prepared", Ok(pack(prepared.restore.unexpected)), _unexpected_everywhere)
        unexpected = tuple(unpack(answer))
        if unexpected and request.strict:
            raise StateMismatchError(
                f"step {record.step} holds names that no rank has a place for: {_some(unexpected)}. Nothing was "
                "loaded; load with strict=False to leave them out, or into the state that was saved"
            )
        self._clock("plan")
        self._next = "done" if wire is None else "shared"
        parts = self._act(lambda: split(prepared.contents, prepared.needs, wire, self._deadline))
        if wire is not None:
            self._exchange("shared", Ok(), _nothing)
        self._clock("share")
        self._next = "pass-0" if parts.rounds else "done"
        self.touched = True
        filling = self._act(lambda: self._fill(prepared, parts, wire))
        self._clock("read")
        rng = self._act(prepared.restore.finish)
        read = filling.read + self._index.nbytes
        read_by_all, once = unpack(self._exchange("done", Ok(pack([read, filling.once])), _sums))
        self._clock("finish")
        return LoadReport(
            step=record.step,
            term=record.term,
            root=self._storage.url,
            missing=prepared.restore.missing,
            unexpected=unexpected,
            rng=rng,
            bytes=prepared.needs.nbytes,
            bytes_read=read,
            bytes_received=prepared.received + filling.received,
            index_bytes_read=index_read,
            index_bytes_received=prepared.received,
            bytes_read_by_all=read_by_all,
            bytes_wanted_once=once,
            seconds=time.monotonic() - self._began,
            phase_s=self._phase_s,
        )

    def refuse(self, phase: str, error: BaseException) -> DscheckError | None:
        """Let no rank wait for this one in that round: it fails for all. What the round says of itself."""
        try:
            self._exchange(phase, Failed(_reason(error)), _nothing)
        except DscheckError as answer:
            return answer
        return None

    def _choose(self, request: Request, posts: Sequence[bytes]) -> bytes:
        requests = [unpack(post)["request"] for post in posts]
        for rank, post in enumerate(requests):
            if post["step"] != request.step:
                raise ConfigError(
                    f"rank 0 loads step {request.step}, rank {rank} loads step {post['step']}: load() is called with "
                    "the same arguments on all ranks",
                    ranks=[0, rank],
                )
            if post != requests[0]:
                raise ConfigError(
                    f"load() is called with other arguments on rank {rank} than on rank 0", ranks=[0, rank]
                )
        return self._see(request.step, [unpack(post)["near"].encode("latin-1") for post in posts])

    def _seen_near(self) -> bytes:
        """What this rank's node holds of a near tier of its own; nothing where all ranks see the same."""
        if not self._tiers.node_local:
            return b""
        try:
            return Node.look(self._tiers.near).encode()
        except DscheckError as error:
            self._warn(f"the near tier {self._tiers.near.url} cannot be read and does not count: {error}")
            return UNREADABLE

    def _see(self, step: int | None, posts: Sequence[bytes]) -> bytes:
        history, counted = self._history(posts)
        record = history.resolve(step)
        tiers = [0]
        if self._tiers.shared is not None and record is not None:
            tiers = self._tiers_of(StepRef(record.step, record.term), counted)
        return pack(
            {
                "record": None if record is None else record.encode().decode(),
                "step": None if record is None else record.step,
                "term": None if record is None else record.term,
                "newest_term": history.newest_term,
                "run": history.run,
                "tiers": tiers,
            }
        )

    def _history(self, posts: Sequence[bytes]) -> tuple[History, frozenset[StepRef]]:
        near, shared = self._tiers.storages[0], self._tiers.shared
        if shared is None:
            return read_history(self._index), frozenset()
        try:
            nodes = [Node.decode(post) for post in posts] if self._tiers.node_local else [Node.look(near)]
        except DscheckError as error:
            self._warn(f"the near tier {near.url} does not count: {error}")
            return read_history(shared), frozenset()
        return read_tiers(near, shared, nodes)

    def _tiers_of(self, ref: StepRef, counted: frozenset[StepRef]) -> list[int]:
        key, shared = record_key(ref.step, ref.term), self._tiers.shared
        assert shared is not None
        return [0] * (ref in counted) + [1] * any(entry.key == key for entry in shared.list(key))

    def _warn(self, what: str) -> None:
        log.warning("%s", what)
        warnings.warn(f"dscheck: {what}", RuntimeWarning, stacklevel=2)

    def _prepare_with_all(self, request: Request, record: Record, wire: Wire | None) -> _Prepared:
        try:
            return self._prepare(request, record, wire)
        except (NeighbourFailedError, NeighbourLateError):
            # Not of this rank: the agreement tells all what that one says of itself, or that it is absent.
            self._exchange("prepared", Ok(pack(None)), _unexpected_everywhere)
            raise
        except BaseException as error:
            self._fail("prepared", error)

    def _prepare(self, request: Request, record: Record, wire: Wire | None) -> _Prepared:
        """All that can be known before the first byte is placed: names, shapes, dtypes, cover. Touches nothing."""
        with HostIndex(self._index, wire, self._index_deadline()) as index:
            contents = Contents.open(self._index, record, index.fetch)
            saved = saved_state(contents, self._ranks.rank, self._ranks.size)
            restore = self._live.prepare(saved, request.only, request.strict)
            numbers = contents.plan.index()
            targets = [target for target in restore.tensors if target.name in numbers]
            _compare(targets, contents, numbers, request.convert_dtype)
            wanted = [(numbers[target.name], part.region, part) for target in targets for part in target.parts]
            needs = needs_of(contents.plan, wanted)
            checksums = contents.checksums(np.unique(needs.file).tolist())
        return _Prepared(contents, restore, needs, checksums, index.received)

    def _index_deadline(self) -> float:
        """Soon enough before the deadline for the ranks of a host to agree with all others on whom they wait for."""
        return self._deadline - min(AGREEMENT_S, AGREEMENT_PART * (self._deadline - time.monotonic()))

    def _fill(self, prepared: _Prepared, parts: Split, wire: Wire | None) -> Filling:
        for device in {target.view.device for target in prepared.needs.targets} - {torch.device("cpu")}:
            torch.accelerator.synchronize(device)  # a step under way, on whatever stream, must not write over it
        filling = Filling(self._storage, prepared.contents, prepared.checksums, self._settings, self._deadline)

        def agree(number: int) -> None:
            passing, self._next = f"pass-{number}", None
            self._exchange(passing, Ok(), _nothing)
            self._next = f"pass-{number + 1}" if number + 1 < parts.rounds else "done"

        filling.run(parts, wire, agree)
        return filling

    def _act(self, act: Callable[[], T]) -> T:
        """This rank's part before the next agreement; its failure, or Ctrl-C, ends that agreement for all."""
        try:
            return act()
        except BaseException as error:
            self._fail(self._next, error)

    def _fail(self, phase: str | None, error: BaseException) -> NoReturn:
        """Raise what ends this rank's load, in the round of `phase` for all ranks, if there is one."""
        known = self._explained(error)
        if phase is not None:
            answer = self.refuse(phase, known)
            if isinstance(known, DeadlineError) and isinstance(answer, DeadlineError) and self._absolves(answer):
                raise answer from known
        if known is error:
            raise error
        raise known from error

    def _absolves(self, answer: DeadlineError) -> bool:
        """Whether other ranks took the time that this one had."""
        return self._ranks.rank not in answer.fields["ranks"]

    def _explained(self, error: BaseException) -> BaseException:
        """What failed because the step is not there any more says so."""
        if self._loading is None or not isinstance(error, CheckpointNotFoundError | StorageError):
            return error
        record, ref = self._loading, StepRef(self._loading.step, self._loading.term)
        with contextlib.suppress(DscheckError):
            deletion = read_deletion(self._storage, ref)
            if deletion is not None or read_step(self._storage, ref) is None:
                who = "" if deletion is None else f" ({deletion.by})"
                return StepVanishedError(
                    f"step {record.step} of term {record.term} was deleted while it was loaded{who}: load the newest "
                    "step, or another one, and `dscheck pin` what must stay",
                    step=record.step,
                    term=record.term,
                )
        return error

    def _clock(self, phase: str) -> None:
        """What has passed since the last call was `phase`."""
        now = time.monotonic()
        self._phase_s[phase], self._since = now - self._since, now

    def _exchange(self, phase: str, mine: Ok | Failed, decide: Callable[[Sequence[bytes]], bytes]) -> bytes:
        name, said = f"{self._round}/{phase}", f"load ({phase})"
        try:
            return self._ranks.exchange(name, mine, decide, deadline=self._deadline, phase=said)
        except RankFailureError as error:
            # The answer of a round is one for all ranks, the one that failed included.
            self.vanished = any(text.startswith(f"{StepVanishedError.__name__}: ") for text in error.fields["messages"])
            raise
        except (KeyboardInterrupt, SystemExit) as interrupt:
            # This rank may have arrived already: unless the round fails, the others wait for it in the next one.
            with contextlib.suppress(DscheckError):
                self._ranks.exchange(name, Failed(_reason(interrupt)), decide, deadline=self._deadline, phase=said)
            raise


def _sums(posts: Sequence[bytes]) -> bytes:
    return pack([sum(numbers) for numbers in zip(*map(unpack, posts), strict=True)])


def _unexpected_everywhere(posts: Sequence[bytes]) -> bytes:
    """Saved names that no rank wants: pipeline stages each want their own. Raises RankFailureError where a rank has not
    got the index.
    """
    found = [unpack(post) for post in posts]
    without = tuple(rank for rank, names in enumerate(found) if names is None)
    if without:
        reason = "another rank of its host did not bring the index in time"
        raise RankFailureError(
            f"ranks {', '.join(map(str, without))}: {reason}; look at why it is late, or raise timeout_s",
            ranks=without,
            phase="load (prepared)",
            messages=(reason,) * len(without),
        )
    return pack(sorted(set.intersection(*map(set, found))))


def _some(names: Sequence[str]) -> str:
    listed = ", ".join(f"'{name}'" for name in names[:LISTED])
    return listed + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _nothing(posts: Sequence[bytes]) -> bytes:
    return b""


def _compare(targets: Sequence[Target], contents: Contents, index: dict[str, int], convert_dtype: bool) -> None:
    """Refuse a state of another model, with both shapes and dtypes of every tensor that differs."""
    wrong = []
    for target in targets:
        row = contents.plan.tensors[index[target.name]]
        if target.shape != row.shape or (target.dtype != row.dtype and not convert_dtype):
            live = f"{target.dtype}{list(target.shape)} live"
            wrong.append(f"'{target.name}': {row.dtype}{list(row.shape)} saved, {live}")
    if wrong:
        shown = "; ".join(wrong[:LISTED]) + (f"; and {len(wrong) - LISTED} more" if len(wrong) > LISTED else "")
        raise StateMismatchError(
            f"step {contents.record.step} holds other tensors than the live state: {shown}. Nothing was loaded; load "
            "into the model that was saved, or pass convert_dtype=True when only dtypes differ"
        )
