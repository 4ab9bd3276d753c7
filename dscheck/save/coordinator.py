"""Rank 0's part of every save: the term, the plan of all ranks, and the one act that makes a step exist."""

from __future__ import annotations

import base64
import hashlib
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from dscheck.commit import assert_newest, check_files, claim, publish, put_files, put_plan
from dscheck.commit.tiered import level_claims
from dscheck.config import Settings
from dscheck.errors import ConfigError, LayoutError, SupersededError
from dscheck.manifest.arrow import encode_files
from dscheck.manifest.files import Extent, FileRow, validate_files
from dscheck.manifest.keys import plan_key
from dscheck.manifest.record import CODED, Digest, Record, Term
from dscheck.ranks.message import pack, unpack
from dscheck.save.claims import RankClaims, pack_exceptions
from dscheck.save.merge import merge
from dscheck.save.planned import Planned
from dscheck.save.retainer import Retainer
from dscheck.save.rivals import Rivals, Samples
from dscheck.storage import Tiers


@dataclass(frozen=True, slots=True)
class Lineage:
    """What the next claim continues from: the newest term seen, the (term, step) loaded or None, the root's run id
    or None.
    """

    seen: int
    parent: tuple[int, int] | None
    run: str | None


@dataclass(slots=True)
class _Attempt:
    step: int
    id: str
    started: float
    metrics: dict[str, float | None]


class Coordinator:
    """Decides the two rounds of a save on rank 0, and the third one where each node has a near tier of its own.

    Called by the thread of the saves, and for a skip by that of the skip, which changes nothing here.
    """

    def __init__(self, tiers: Tiers, settings: Settings, versions: Mapping[str, str], retainer: Retainer) -> None:
        self._tiers, self._storage, self._settings, self._versions = tiers, tiers.near, settings, versions
        self._retainer = retainer
        self._lineage = Lineage(0, None, None)
        self._term: Term | None = None
        self._tried: int | None = None
        self._committed: int | None = None
        self._claims: dict[int, tuple[str, RankClaims]] = {}
        self._digests: tuple[str, ...] = ()
        self._planned: Planned | None = None
        self._stored_in: int | None = None
        self._attempt: _Attempt | None = None
        self._own_claims: set[str] = set()

    def successor(self) -> Coordinator:
        """Who takes over from one whose thread hangs: in a new term, from the newest step that was acknowledged.

        Whatever the old one still does is then in a term that no longer counts.
        """
        new = Coordinator(self._tiers, self._settings, self._versions, self._retainer)
        new.continue_from(self._lineage if self._term is None else self._beyond(self._term))
        new._own_claims = set(self._own_claims)
        new._claims, new._digests, new._planned = dict(self._claims), self._digests, self._planned
        return new

    def _beyond(self, term: Term) -> Lineage:
        return Lineage(term.term, term.parent if self._committed is None else (term.term, self._committed), term.run)

    def continue_from(self, lineage: Lineage) -> None:
        """The next save claims a new term: the job was just started, or has loaded a step."""
        self._lineage, self._term, self._tried, self._committed = lineage, None, None, None

    def decide_plan(self, payloads: Sequence[bytes], await_uploads: Callable[[], None] = lambda: None) -> bytes:
        """The answer to the first round: skip, or the term, the attempt and the plan.

        `await_uploads` returns when a claim may follow: what is uploaded comes under its own term, if it can (P32).
        """
        posts = [unpack(payload) for payload in payloads]
        step = _same_step(posts)
        if any(post["busy"] for post in posts):
            return pack({"skip": True})
        term = self._term_for(step, await_uploads)
        self._tried = step
        self._receive(posts)
        known = self._planned
        planned = self._replan(posts)
        if not planned.rivals.agree(lambda: self._samples(posts, known), self._settings.replicas):
            raise LayoutError(
                f"step {step}: a tensor that one mesh held is now claimed by other ranks too, and cannot be compared "
                "before the next save; this one is given up"
            )
        self._store_plan(term, planned)
        self._attempt = _Attempt(step, uuid.uuid4().hex, time.time(), posts[0]["metrics"])
        answer: dict[str, Any] = {"skip": False, "term": term.term, "term_id": term.id, "id": self._attempt.id}
        answer["plan"] = planned.encoded.head.sha256
        if any(post["plan"] != answer["plan"] for post in posts):
            answer["exceptions"] = pack_exceptions(planned.exceptions)
            answer["contested"] = pack_exceptions(dict.fromkeys(planned.rivals.regions, ()))
        if self._tiers.node_local and any(post["stored"] != plan_key(term.term, answer["plan"]) for post in posts):
            answer["plan_text"] = base64.b64encode(planned.encoded.data).decode()
        return pack(answer)

    def decide_arrive(self, payloads: Sequence[bytes]) -> bytes:
        """The answer to the second round: the step exists. Proves invariant C4 before, and C1 and C2 by `publish`.

        Where each node has a near tier of its own, the answer is the record and what it names: each rank publishes it
        there (`decide_kept`).
        """
        assert self._planned is not None
        assert self._term is not None
        assert self._attempt is not None
        planned, term, attempt = self._planned, self._term, self._attempt
        rows = [_row(rank, unpack(payload)) for rank, payload in enumerate(payloads)]
        validate_files(rows, planned.file_ends)
        files = encode_files(rows)
        record = Record(
            step=attempt.step,
            term=term.term,
            term_id=term.id,
            plan=planned.encoded.head,
            files=_digest(files),
            counts=planned.counts,
            versions=self._versions,
            started=attempt.started,
            committed=time.time(),
            id=attempt.id,
            metrics=attempt.metrics,
            requires=(CODED,) if any(row.coded for row in rows) else (),
        )
        if self._tiers.node_local:
            texts = {"record": record.encode().decode(), "files": base64.b64encode(files).decode()}
            return pack({"committed": record.committed} | texts)
        check_files(self._storage, attempt.step, term.term, rows)
        put_files(self._storage, attempt.step, term.term, files)
        publish(self._storage, record)
        self._committed = attempt.step
        self._retainer.wake(term, record)
        return pack({"committed": record.committed})

    def decide_kept(self, payloads: Sequence[bytes]) -> bytes:
        """The answer to the third round: every node has published the record, so that the step counts."""
        assert self._attempt is not None
        self._committed = self._attempt.step
        return pack({})

    def _term_for(self, step: int, await_uploads: Callable[[], None]) -> Term:
        """The term of this attempt: a first save, or a second try of a step, claims a new one (C2)."""
        term = self._term
        if term is not None and (self._tried is None or step > self._tried):
            assert_newest(self._storage, term)
            return term
        if term is not None:
            # A claim that fails may still arrive, and continues from there: this term must not go on beyond it.
            self.continue_from(self._beyond(term))
        await_uploads()
        self._term = self._claim()
        if self._tiers.shared is not None:
            level_claims(self._tiers.shared, self._tiers.near)
        return self._term

    def _claim(self) -> Term:
        """The next term. One that an earlier, failed claim of this very job has after all is passed over.

        The shared tier is claimed first, so that the claims of a near tier are never ahead of it for long.
        """
        claimed = self._tiers.shared or self._tiers.near
        if claimed is not self._tiers.near:
            level_claims(self._tiers.near, claimed)
        while True:
            lineage, identity = self._lineage, uuid.uuid4().hex
            self._own_claims.add(identity)
            try:
                return claim(
                    claimed,
                    seen=lineage.seen,
                    parent=lineage.parent,
                    run=lineage.run,
                    host=socket.gethostname(),
                    now=time.time(),
                    identity=identity,
                )
            except SupersededError as error:
                if error.fields.get("id") not in self._own_claims:
                    raise
                self._lineage = replace(lineage, seen=lineage.seen + 1)

    def _receive(self, posts: Sequence[Mapping[str, Any]]) -> None:
        for rank, post in enumerate(posts):
            if post["claims"] is not None:
                self._claims[rank] = (post["digest"], RankClaims.decode(post["claims"].encode(), len(posts)))
            if self._claims.get(rank, ("",))[0] != post["digest"]:
                raise LayoutError(
                    f"the claims of rank {rank} were lost with an earlier save; this one is given up, the next resends"
                )

    def _replan(self, posts: Sequence[Mapping[str, Any]]) -> Planned:
        """The plan of these claims; made anew when any rank's digest is not the one the present plan was made of."""
        digests = tuple(post["digest"] for post in posts)
        if self._planned is None or digests != self._digests:
            self._planned = Planned.of(merge(self._all_claims(), self._settings.block_bytes))
            self._stored_in, self._digests = None, digests
        return self._planned

    def _all_claims(self) -> list[RankClaims]:
        return [self._claims[rank][1] for rank in range(len(self._claims))]

    def _store_plan(self, term: Term, planned: Planned) -> None:
        """A plan belongs to its term alone (TRAPS 37), and is written when it changed, not at each save."""
        if self._stored_in != term.term:
            put_plan(self._storage, term.term, planned.encoded)
            self._stored_in = term.term

    def _samples(self, posts: Sequence[Mapping[str, Any]], known: Planned | None) -> list[Samples]:
        """What the ranks sent, read by the plan that they know: that of before this save."""
        contested, plan = (Rivals(), "") if known is None else (known.rivals, known.encoded.head.sha256)
        samples = []
        for rank, (post, rows) in enumerate(zip(posts, contested.rows_by_rank(len(posts)), strict=True)):
            sent, claims = post["samples"], self._claims[rank][1]
            if not post["full"] and post["plan"] != plan:
                sent, watched = [], np.empty(0, np.int64)
            else:
                watched = claims.watched(rank, None if post["full"] or known is None else rows)
            if len(sent) != len(watched):
                raise LayoutError(f"rank {rank} sent {len(sent)} samples, {len(watched)} expected")
            samples.append(Samples(watched, np.array(sent, np.uint64)))
        return samples


def _same_step(posts: Sequence[Mapping[str, Any]]) -> int:
    step = posts[0]["step"]
    for rank, post in enumerate(posts):
        if post["step"] != step:
            raise ConfigError(
                f"rank 0 saves step {step}, rank {rank} saves step {post['step']}: save() is called with the same step "
                "on all ranks, the same number of times",
                ranks=[0, rank],
            )
    assert isinstance(step, int)
    return step


def _digest(text: bytes) -> Digest:
    return Digest(len(text), hashlib.sha256(text).hexdigest())


def pack_row(row: FileRow) -> bytes:
    """A rank's arrival: its row of files.arrow."""
    return pack(asdict(row))


def _row(rank: int, post: Mapping[str, Any]) -> FileRow:
    extents = {name: Extent(**post[name]) for name in ("checksums", "ours", "mine")}
    return FileRow(rank=rank, size=post["size"], blocks=post["blocks"], **extents)
