"""Arrival and commit of many ranks through the real exchange, over one store: `python -m benchmarks.scale_store RANKS`.

Ranks are threads of one process, each with its own connections; rank 0 has the real coordinator, and data files are of
a few bytes in memory. So it measures the exchange and what the coordinator does, and not the network between hosts.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from typing import Any

from dscheck.config import Settings
from dscheck.layout.region import Region
from dscheck.manifest.files import Extent, FileRow
from dscheck.manifest.keys import data_key
from dscheck.ranks.base import Ok, Ranks
from dscheck.ranks.message import pack, unpack
from dscheck.ranks.store import StoreBoard, StoreRanks, host_store
from dscheck.save.claims import Claim, RankClaims
from dscheck.save.coordinator import Coordinator, pack_row
from dscheck.save.retainer import Retainer
from dscheck.storage import MemoryStorage, Tiers

SAVES = 4
TENSORS = 50
DEADLINE_S = 300.0


class Job:
    """Ranks that each hold one row of some tensors, and count what they send and are answered."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.storage = MemoryStorage()
        self.coordinator = Coordinator(Tiers(self.storage), Settings(), {}, Retainer(self.storage, None))
        self.sent = [[0, 0] for _ in range(SAVES)]
        self.answered = [[0, 0] for _ in range(SAVES)]
        self.spent = [[0.0, 0.0] for _ in range(SAVES)]
        self.ended = [0.0] * (SAVES + 1)
        self.errors: list[BaseException] = []
        self._lock = threading.Lock()

    def run(self, ranks: Ranks) -> None:
        try:
            ranks.exchange("open", Ok(), lambda posts: b"", deadline=time.monotonic() + DEADLINE_S, phase="open")
            self.ended[0] = max(self.ended[0], time.monotonic())
            for save in range(SAVES):
                self._save(ranks, save)
        except BaseException as error:
            self.errors.append(error)

    def _save(self, ranks: Ranks, save: int) -> None:
        rank = ranks.rank
        row = Region((rank, 0), (rank + 1, 16))
        claims = (
            Claim(f"layers.{number}.weight", "float32", (self.size, 16), (row,), (rank,), "mesh")
            for number in range(TENSORS)
        )
        text = RankClaims.of("host", (), claims).encode()
        known = {"digest": hashlib.sha256(text).hexdigest(), "plan": "" if save == 0 else self.plan, "full": save == 0}
        post = {"step": save, "busy": False, "claims": text.decode() if save == 0 else None, "samples": []} | known
        post["samples"] = [rank] * TENSORS if save == 0 else []
        if rank == 0:
            post["metrics"] = {}
        answer = self._exchange(ranks, save, 0, pack(post))
        self.plan = answer["plan"]
        written = self._write(save, answer["term"], rank)
        self._exchange(ranks, save, 1, pack_row(written))
        with self._lock:
            self.ended[save + 1] = max(self.ended[save + 1], time.monotonic())

    def _write(self, step: int, term: int, rank: int) -> FileRow:
        data = bytes(64 * TENSORS + 4 * TENSORS + 20)
        writer = self.storage.create(data_key(step, term, rank))
        writer.write(data)
        writer.commit()
        extents, at = [], 64 * TENSORS
        for size in (4 * TENSORS, 10, 10):
            extents.append(Extent(at, size, hashlib.sha256(data[at : at + size]).hexdigest()))
            at += size
        return FileRow(rank, len(data), TENSORS, *extents)

    def _exchange(self, ranks: Ranks, save: int, round: int, message: bytes) -> dict[str, Any]:
        decide = (self.coordinator.decide_plan, self.coordinator.decide_arrive)[round]

        def timed(posts: Any) -> bytes:
            began = time.monotonic()
            answer = decide(posts)
            self.spent[save][round] = time.monotonic() - began
            self.sent[save][round] = sum(map(len, posts))
            self.answered[save][round] = len(answer)
            return answer

        name = f"save-{save}/{round}"
        deadline = time.monotonic() + DEADLINE_S
        found: dict[str, Any] = unpack(ranks.exchange(name, Ok(message), timed, deadline=deadline, phase=name))
        return found


def simulate(size: int) -> dict[str, Any]:
    """Seconds of a first save and of steady ones, and the messages and bytes at the coordinator."""
    job, server = Job(size), host_store(0, "scale")
    boards = [StoreBoard(["localhost"], server.port, "scale", server if rank == 0 else None) for rank in range(size)]
    members = [StoreRanks(rank, size, board) for rank, board in enumerate(boards)]
    threading.stack_size(256 << 10)
    threads = [threading.Thread(target=job.run, args=(member,), daemon=True) for member in members]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    for member in members:
        member._linger_s = 0.0
        member.close()
    if job.errors:
        raise job.errors[0]
    took = [after - before for before, after in zip(job.ended, job.ended[1:], strict=False)]
    steady = sorted(range(1, SAVES), key=lambda save: took[save])[(SAVES - 1) // 2]
    return {
        "ranks": size,
        "open_s": job.ended[0] - began,
        "messages_a_save": 2 * size,
        "first": _of(job, 0, took[0]),
        "steady": _of(job, steady, took[steady]),
    }


def _of(job: Job, save: int, seconds: float) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "decide_plan_s": job.spent[save][0],
        "decide_arrive_s": job.spent[save][1],
        "plan_bytes": job.sent[save][0],
        "arrive_bytes": job.sent[save][1],
        "answer_bytes": job.answered[save][0] * job.size,
    }


if __name__ == "__main__":
    print(json.dumps(simulate(int(sys.argv[1]))))
