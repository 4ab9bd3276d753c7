"""Verified bytes from rank to rank during a load: over the job's own process group, on the main thread (C10)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

from dscheck.errors import DeadlineError, DscheckError, RankFailureError
from dscheck.ranks.opening import group_device

PHASE = "load (passing on)"

FIRST_TAG = 0x64730000
"""Tags from here on: what training sends has others."""

SHORTEST_S = 0.001

EARLY_S = 0.05
"""By so much may the group's own clock end a wait too soon: it counts whole milliseconds."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """`nbytes` that rank `source` sends."""

    source: int
    nbytes: int


class Wire(Protocol):
    """What a load asks of the ranks' connection. Each method is called by all ranks, which have agreed to."""

    @property
    def rank(self) -> int: ...

    def gather(self, mine: bytes, deadline: float, on_device: bool = False) -> list[bytes]:
        """What every rank has, by rank; `on_device` as for `swap`, which needs such a gather before it.

        Raises RankFailureError, or DeadlineError on time.monotonic().
        """

    def swap(
        self, sends: Sequence[tuple[int, torch.Tensor]], arrivals: Sequence[Arrival], on_device: bool, deadline: float
    ) -> list[torch.Tensor]:
        """The arrivals, as bytes, when all of `sends` (rank, bytes) have left; they come in the order they are sent in.

        `on_device`, the same on all ranks: by way of the accelerators where the group can, and left there. Raises as
        `gather` does.
        """


def open_wire() -> Wire | None:
    """The default process group, if there is one of several ranks."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return GroupWire() if several else None


class GroupWire:
    """The default process group."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self._size = dist.get_world_size()

    def gather(self, mine: bytes, deadline: float, on_device: bool = False) -> list[bytes]:
        device = group_device(prefer_accelerator=on_device)
        sizes = self._gather(torch.tensor([len(mine)], device=device), deadline)
        lengths = [int(size.item()) for size in sizes]
        padded = torch.zeros(max(1, *lengths), dtype=torch.uint8)
        padded[: len(mine)] = torch.from_numpy(np.frombuffer(mine, np.uint8).copy())  # torch's own refuses no bytes
        texts = self._gather(padded.to(device), deadline)
        return [text[:length].cpu().numpy().tobytes() for text, length in zip(texts, lengths, strict=True)]

    def swap(
        self, sends: Sequence[tuple[int, torch.Tensor]], arrivals: Sequence[Arrival], on_device: bool, deadline: float
    ) -> list[torch.Tensor]:
        device = group_device(prefer_accelerator=on_device)
        moved = {id(data): data.to(device) for _, data in sends}
        found = [torch.empty(arrival.nbytes, dtype=torch.uint8, device=device) for arrival in arrivals]
        counts = dict.fromkeys(range(self._size), 0)
        steps: list[tuple[int, dist.P2POp]] = []
        for peer, data in sends:
            steps.append((peer, dist.P2POp(dist.isend, moved[id(data)], peer, tag=FIRST_TAG + counts[peer])))
            counts[peer] += 1
        counts = dict.fromkeys(range(self._size), 0)
        for arrival, data in zip(arrivals, found, strict=True):
            peer = arrival.source
            steps.append((peer, dist.P2POp(dist.irecv, data, peer, tag=FIRST_TAG + counts[peer])))
            counts[peer] += 1
        peers = [peer for peer, _ in steps]
        with _translated(peers, deadline):
            works = dist.batch_isend_irecv([step for _, step in steps]) if steps else []
        for number, work in enumerate(works):
            self._wait(work, device, peers[number : number + 1] if len(works) == len(peers) else peers, deadline)
        return found

    def _gather(self, mine: torch.Tensor, deadline: float) -> list[torch.Tensor]:
        found = [torch.empty_like(mine) for _ in range(self._size)]
        others = [rank for rank in range(self._size) if rank != self.rank]
        with _translated(others, deadline):
            work = dist.all_gather(found, mine, async_op=True)
        assert work is not None
        self._wait(work, mine.device, others, deadline)
        return found

    def _wait(self, work: dist.Work, device: torch.device, peers: Sequence[int], deadline: float) -> None:
        with _translated(peers, deadline):
            work.wait(timedelta(seconds=max(SHORTEST_S, deadline - time.monotonic())))
            if device.type != "cpu":  # there it has only been made an order of the stream
                event = torch.accelerator.current_stream(device).record_event()
                while not event.query():
                    if time.monotonic() > deadline:
                        raise _late(peers)
                    time.sleep(SHORTEST_S / 10)


@contextmanager
def _translated(peers: Sequence[int], deadline: float) -> Iterator[None]:
    """The group's own errors become ours, with the ranks that were waited for."""
    try:
        yield
    except DscheckError:
        raise
    except RuntimeError as error:
        if time.monotonic() >= deadline - EARLY_S:
            raise _late(peers) from error
        message = f"the process group failed: {str(error).splitlines()[0]}"
        ranks = tuple(sorted(set(peers)))
        raise RankFailureError(
            f"{PHASE}: {message}, with {_named(ranks)}", ranks=ranks, phase=PHASE, messages=(message,)
        ) from error


def _late(peers: Sequence[int]) -> DscheckError:
    ranks = tuple(sorted(set(peers)))
    waited_for = f"bytes to or from {_named(ranks)}"
    return DeadlineError(
        f"{PHASE}: waited for {waited_for} over the process group until the deadline; look at why they are late, or "
        "raise timeout_s",
        ranks=ranks,
        phase=PHASE,
        waited_for=waited_for,
    )


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
