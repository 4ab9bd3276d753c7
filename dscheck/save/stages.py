"""What one attempt goes through on the thread of the saves: the plan, the data file, the arrival."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dscheck.commit import await_record, check_files, confirm, publish, put_files
from dscheck.commit.publish import put_same
from dscheck.commit.tiered import level_claims
from dscheck.config import Settings
from dscheck.errors import DeadlineError, DscheckError, RankFailureError, SaveSkippedError
from dscheck.manifest.arrow import decode_files
from dscheck.manifest.keys import data_key, files_key, plan_key, record_key
from dscheck.manifest.record import Record, decode_record
from dscheck.ranks.base import Failed, Ok, Ranks
from dscheck.ranks.message import pack, unpack
from dscheck.save.attempt import Attempt, Moment
from dscheck.save.claims import unpack_exceptions
from dscheck.save.codecs import choice_of
from dscheck.save.coordinator import pack_row
from dscheck.save.fragments import Layout
from dscheck.save.handle import GRACE_S
from dscheck.save.shares import Agreed, Box, PlanMaker, Shares, boxes_of
from dscheck.save.write import DataFile
from dscheck.storage import Tiers

log = logging.getLogger("dscheck")

LAST_LOOK_S = 2.0
"""How long a rank whose deadline has passed looks for the record before it reports failure."""


@dataclass(slots=True)
class Standing:
    """What this rank and the coordinator know of each other.

    `digest`: of the claims that the coordinator has. `agreed`: what its last plan told. `shares`: by which the next
    save captures, as far as it was made already. `confirmed`: the term that this rank has seen in the storage.
    `stored`: the key of the plan that this rank's node has in a near tier of its own.
    Written by the thread of the saves; the training thread reads `digest` before the others, and makes `shares`.
    """

    digest: str = ""
    agreed: Agreed = field(default_factory=Agreed)
    shares: Shares | None = None
    confirmed: int | None = None
    stored: str = ""


class Stages:
    """Takes one attempt after the other through its rounds. `check` raises when this rank has to give up."""

    def __init__(
        self,
        tiers: Tiers,
        ranks: Ranks,
        settings: Settings,
        standing: Standing,
        make: PlanMaker,
        check: Callable[[], None],
    ) -> None:
        self._tiers, self._storage, self._ranks, self._settings = tiers, tiers.near, ranks, settings
        self._standing, self._make, self._check_stop = standing, make, check
        self._layout: Layout | None = None
        self._codecs = choice_of(settings)

    def run(self, attempt: Attempt) -> None:
        """Commit it, or raise why not: the caller then tells the others."""
        if attempt.error is not None:
            raise attempt.error
        self._check_stop()
        self._write(attempt, self._plan(attempt))

    def tell(self, attempt: Attempt, error: Exception | None) -> None:
        """The failure of this rank ends the round that the others are in, or come to."""
        phase = attempt.untold()
        if phase is not None:
            with contextlib.suppress(DscheckError):
                failed = Failed(f"{type(error).__name__}: {error}")
                self._exchange(attempt, phase, failed, time.monotonic() + GRACE_S)

    def _plan(self, attempt: Attempt) -> dict[str, Any]:
        """First round: what this rank holds against the plan, the term and the attempt that it belongs to."""
        moment, capture = attempt.moment, attempt.capture
        post: dict[str, Any] = {"step": attempt.step, "busy": attempt.busy}
        if self._ranks.rank == 0:
            post["metrics"] = dict(attempt.metrics)
        if moment is not None and capture is not None:
            shares = moment.shares
            post |= {
                "digest": shares.holdings.digest,
                "claims": shares.holdings.text.decode() if shares.full else None,
                "plan": shares.agreed.plan,
                "full": shares.full,
                "stored": self._standing.stored,
                "samples": [_hash(capture.sample(number)) for number in range(len(shares.watched))],
            }
        answer = self._join(attempt, "plan", Ok(pack(post)))
        if answer["skip"]:
            raise SaveSkippedError(f"step {attempt.step} was skipped: a rank was busy with an earlier save")
        if moment is None or attempt.ended:
            raise _given_up(attempt)
        attempt.planned = True
        self._agree(moment, answer)
        return answer

    def _agree(self, moment: Moment, answer: Mapping[str, Any]) -> None:
        """Note what the answer says, and prepare by what the next save captures, while the tensors are at hand."""
        standing, holdings = self._standing, moment.shares.holdings
        if "exceptions" in answer:
            exceptions = unpack_exceptions(answer["exceptions"])
            standing.agreed = Agreed(answer["plan"], exceptions, frozenset(unpack_exceptions(answer["contested"])))
        alone = self._ranks.size == 1
        if not moment.shares.serves(holdings, standing.agreed, False) and (alone or moment.counts is not None):
            locals = () if moment.counts is None else moment.counts.locals
            ranks = self._ranks.rank, self._ranks.size
            standing.shares = Shares.of(holdings, standing.agreed, False, locals, self._make, ranks, moment.shares)
        standing.digest = holdings.digest

    def _boxes(self, shares: Shares) -> tuple[Box, ...]:
        """What this rank writes under the plan that was just answered."""
        agreed = self._standing.agreed
        for made in (shares, self._standing.shares):
            if made is not None and made.holdings is shares.holdings and made.agreed is agreed:
                return made.boxes
        return boxes_of(shares.holdings, self._ranks.rank, agreed.exceptions)

    def _layout_of(self, shares: Shares, boxes: tuple[Box, ...]) -> Layout:
        known = self._layout
        if known is None or not known.serves(shares.plan, boxes):
            self._layout = known = Layout(shares.plan, boxes, shares.sources, self._settings.block_bytes)
        return known

    def _write(self, attempt: Attempt, answer: Mapping[str, Any]) -> None:
        term, rank, trace, moment = answer["term"], self._ranks.rank, attempt.trace, attempt.moment
        if self._standing.confirmed != term:
            with trace.span("confirm the term"):
                if self._tiers.node_local and self._tiers.shared is not None:
                    level_claims(self._tiers.shared, self._storage)
                confirm(self._storage, term, answer["term_id"])
            self._standing.confirmed = term
        assert moment is not None
        boxes = self._boxes(moment.shares)
        attempt.catch_up(boxes)
        attempt.settle("late")
        with trace.span("encode objects"):
            objects = moment.objects()
        key = data_key(attempt.step, term, rank)
        file = DataFile(self._storage, key, self._settings, trace, lambda: self._check(attempt))
        fragments = attempt.fragments(self._layout_of(moment.shares, boxes))
        began = time.monotonic()
        row = file.write(rank, fragments.layout.sizes, fragments, objects, self._codecs.of(boxes))
        wrote_s = time.monotonic() - began
        attempt.handle.stats.written_s = time.monotonic() - attempt.handle.began
        try:
            arrived = self._join(attempt, "arrive", Ok(pack_row(row)))
        except (DeadlineError, RankFailureError) as error:
            # A record on one node's own disk does not tell whether the others have it too.
            if self._tiers.node_local or not self._committed_anyhow(attempt.step, term, answer["id"], error):
                raise
            return
        if self._tiers.node_local:
            attempt.keeping = True
            with trace.span("publish on this node"):
                self._publish(attempt, answer, arrived)
            self._join(attempt, "kept", Ok())
        self._codecs.wrote(self._storage, key, fragments.layout, wrote_s)

    def _publish(self, attempt: Attempt, answer: Mapping[str, Any], arrived: Mapping[str, Any]) -> None:
        """The step exists in this node's part of the near tier: what its record names is there, as far as it is ours.

        Every rank of the node does this: who comes second finds the same bytes.
        """
        near, files = self._storage, base64.b64decode(arrived["files"])
        record = decode_record(arrived["record"].encode(), record_key(attempt.step, answer["term"]))
        assert isinstance(record, Record)
        key = plan_key(record.term, answer["plan"])
        if self._standing.stored != key:
            put_same(near, key, base64.b64decode(answer["plan_text"]))
            self._standing.stored = key
        rows = decode_files(files, files_key(record.step, record.term))
        check_files(near, record.step, record.term, rows, self._ranks.rank)
        put_files(near, record.step, record.term, files)
        publish(near, record)

    def _committed_anyhow(self, step: int, term: int, id: str, error: DscheckError) -> bool:
        """The coordinator may have committed and died, or been too slow to say so: the record knows (C7)."""
        # Past the deadline it may be in the middle of it; when a rank has failed it is not.
        until = time.monotonic() + (LAST_LOOK_S if isinstance(error, DeadlineError) else 0.0)
        try:
            return await_record(self._storage, step, term, id, deadline=until)
        except DscheckError as error:
            log.warning("step %d: the record could not be read either: %s", step, error)
            return False

    def _join(self, attempt: Attempt, phase: str, mine: Ok) -> dict[str, Any]:
        if not attempt.join(phase):
            raise _given_up(attempt)
        with attempt.trace.span(phase):
            return self._exchange(attempt, phase, mine, attempt.handle.deadline)

    def _exchange(self, attempt: Attempt, phase: str, mine: Ok | Failed, deadline: float) -> dict[str, Any]:
        coordinator, trace = attempt.coordinator, attempt.trace

        def decide(posts: Sequence[bytes]) -> bytes:
            with trace.span("plan of all ranks" if phase == "plan" else "record"):
                if phase == "plan":
                    return coordinator.decide_plan(posts, attempt.await_uploads)
                return coordinator.decide_arrive(posts) if phase == "arrive" else coordinator.decide_kept(posts)

        attempt.exchanging = True
        try:
            name = f"{phase} of step {attempt.step}"
            answer = self._ranks.exchange(f"save-{attempt.number}/{phase}", mine, decide, deadline=deadline, phase=name)
        finally:
            attempt.exchanging = False
        decoded: dict[str, Any] = unpack(answer)
        return decoded

    def _check(self, attempt: Attempt) -> None:
        self._check_stop()
        if time.monotonic() > attempt.handle.deadline:
            raise DeadlineError(
                f"step {attempt.step}: rank {self._ranks.rank} did not write its data in time",
                ranks=[self._ranks.rank],
                phase="write",
                waited_for=self._storage.url,
            )


def _given_up(attempt: Attempt) -> DscheckError:
    return DscheckError(f"step {attempt.step}: this save was given up at its deadline")


def _hash(sample: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(sample, digest_size=8).digest(), "little")
