"""The ranks of a host read each part of an index once together, and a rank that fails keeps none of them waiting."""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dscheck.commit.parts import Direct, Part
from dscheck.errors import DeadlineError, RankFailureError, StorageError
from dscheck.load import index
from dscheck.load.index import HostIndex
from dscheck.load.loader import _unexpected_everywhere
from dscheck.load.mail import NeighbourFailedError
from dscheck.load.passing import Passing
from dscheck.ranks.base import Ok, Ranks
from dscheck.ranks.message import pack
from dscheck.storage import MemoryStorage
from dscheck.testing import Faulty, fail_at
from dscheck.testing.ranks import run_ranks

KEYS = {f"plans/{name}.arrow": np.random.default_rng(i).bytes(400) for i, name in enumerate("ab")}


class Threads:
    """A Wire that gathers over the ranks' own exchange; ranks of other hosts have no address that leads to them."""

    def __init__(self, ranks: Ranks, a_host: int) -> None:
        self.rank, self._ranks, self._a_host, self._rounds = ranks.rank, ranks, a_host, 0

    def gather(self, mine: bytes, deadline: float, on_device: bool = False) -> list[bytes]:
        self._rounds += 1
        answer = self._ranks.exchange(
            f"gather-{self._rounds}",
            Ok(base64.b64encode(mine)),
            lambda posts: json.dumps([post.decode() for post in posts]).encode(),
            deadline=deadline,
            phase="gather",
        )
        posts = [base64.b64decode(post) for post in json.loads(answer)]
        if self._rounds > 1:
            return posts
        here = self.rank // self._a_host
        return [post if rank // self._a_host == here else b"" for rank, post in enumerate(posts)]

    def swap(self, *args: Any) -> list[Any]:
        raise AssertionError("an index is not passed on over the group")


def storage_of() -> Faulty:
    storage = Faulty(MemoryStorage())
    for key, data in KEYS.items():
        storage.put_if_absent(key, data)
    return storage


def run_hosts(
    ranks: int, a_host: int, storages: Sequence[Any], act: Callable[[int, HostIndex], Any], timeout_s: float = 20.0
) -> list[Any]:
    def run(member: Ranks) -> Any:
        wire = Threads(member, a_host)
        with HostIndex(storages[member.rank], wire, time.monotonic() + timeout_s) as found:
            return act(member.rank, found)

    return run_ranks(ranks, run)


def descriptors() -> set[str]:
    """What this process has open in memory."""
    folder = Path("/proc/self/fd")
    return {name for name in os.listdir(folder) if "dscheck-" in _target(folder / name)}


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except FileNotFoundError:  # the folder's own
        return ""


@pytest.mark.parametrize("last", [1, 2])
@pytest.mark.parametrize("meet", [HostIndex, Passing], ids=["index", "passing on"])
def test_ranks_that_do_not_meet_leave_nothing_open(meet: Any, last: int) -> None:
    class Lost:
        rank, gathered = 0, 0

        def gather(self, mine: bytes, deadline: float, on_device: bool = False) -> list[bytes]:
            self.gathered += 1
            if self.gathered == last:
                raise RankFailureError("rank 1 is gone", ranks=(1,), phase="gather", messages=("gone",))
            return [mine, b""]

    before = descriptors()
    arguments = (MemoryStorage(), Lost(), 0.0) if meet is HostIndex else (Lost(), [], False, 0.0)
    with pytest.raises(RankFailureError, match="rank 1 is gone"):
        meet(*arguments)
    assert descriptors() == before


@st.composite
def parts(draw: st.DrawFn) -> list[Part]:
    """Some parts of both objects, which may overlap, lie apart, or be empty."""
    cuts = st.integers(0, 40).map(lambda at: at * 10)
    bounds = draw(st.lists(st.tuples(st.sampled_from(sorted(KEYS)), cuts, cuts), max_size=6))
    return [Part(key, min(a, b), abs(a - b)) for key, a, b in bounds]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.data())
def test_each_rank_gets_what_it_wants_and_its_host_reads_the_union(
    hosts: int, a_host: int, data: st.DataObject
) -> None:
    ranks = hosts * a_host
    wanted = [[data.draw(parts()) for _ in range(2)] for _ in range(ranks)]
    storages = [storage_of() for _ in range(ranks)]

    def act(rank: int, found: HostIndex) -> int:
        for some in wanted[rank]:
            assert list(found.fetch(some)) == [KEYS[key][offset : offset + size] for key, offset, size in some]
        return found.received

    received = run_hosts(ranks, a_host, storages, act)
    for host in range(hosts):
        members = range(host * a_host, (host + 1) * a_host)
        asked = sum(op.nbytes for rank in members for op in storages[rank].log if op.name == "read")
        if a_host == 1:
            assert received[members[0]] == 0
            continue
        least = sum(part.size for i in range(2) for part in {part for rank in members for part in wanted[rank][i]})
        gaps = sum(map(len, KEYS.values())) * 2 * a_host
        assert least <= asked <= least + gaps
        assert all(received[rank] <= sum(part.size for some in wanted[rank] for part in some) for rank in members)


def test_ranks_of_a_host_read_equal_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    storages = [storage_of() for _ in range(4)]
    every = [Part(key, offset, 50) for key in KEYS for offset in range(0, 400, 50)]
    found = run_hosts(4, 4, storages, lambda rank, one: (list(one.fetch(every)), one.received))
    assert [data for data, _ in found] == [[KEYS[key][at : at + size] for key, at, size in every]] * 4
    assert [sum(op.nbytes for op in storage.log if op.name == "read") for storage in storages] == [200] * 4
    assert [received for _, received in found] == [600] * 4


def test_a_rank_that_cannot_read_fails_at_once_and_its_host_names_it() -> None:
    storages: list[Any] = [storage_of() for _ in range(4)]
    storages[2] = Faulty(storages[2], fail_at("read", "plans/*"))
    every = [Part(key, 0, 400) for key in KEYS]
    began = time.monotonic()
    found = run_hosts(4, 2, storages, lambda rank, one: list(one.fetch(every)))
    assert time.monotonic() - began < 10
    assert found[0] == found[1] == list(KEYS.values()), "another host has nothing to do with it"
    assert isinstance(found[2], StorageError)
    assert isinstance(found[3], NeighbourFailedError)
    assert found[3].ranks == (2,)  # type: ignore[attr-defined]
    assert "injected" in str(found[3])


def test_a_rank_that_says_nothing_is_named_at_the_deadline() -> None:
    def act(rank: int, one: HostIndex) -> Any:
        if rank == 1:
            time.sleep(3)  # and asks for nothing
            return None
        return list(one.fetch([Part("plans/a.arrow", 0, 10)]))

    found = run_hosts(3, 3, [storage_of() for _ in range(3)], act, timeout_s=1.0)
    for error in (found[0], found[2]):
        assert isinstance(error, DeadlineError | NeighbourFailedError)
    late = [error for error in found if isinstance(error, DeadlineError)]
    assert late
    for error in late:
        assert (error.ranks, error.phase) == ((1,), "load (index)")  # type: ignore[attr-defined]
        assert "what rank 1 has to say" in str(error)


def test_no_load_goes_on_without_the_index_of_a_rank() -> None:
    with pytest.raises(RankFailureError, match="ranks 1, 3") as caught:
        _unexpected_everywhere([pack(["a"]), pack(None), pack([]), pack(None)])
    assert caught.value.ranks == (1, 3)  # type: ignore[attr-defined]


def test_without_memory_to_share_each_rank_reads_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_open_mailbox", lambda: None)
    storages = [storage_of() for _ in range(2)]
    found = run_hosts(2, 2, storages, lambda rank, one: (list(one.fetch([Part("plans/a.arrow", 5, 10)])), one.received))
    assert found == [([KEYS["plans/a.arrow"][5:15]], 0)] * 2


def test_near_parts_are_one_read_and_far_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dscheck.commit.parts.GAP_BYTES", 20)
    monkeypatch.setattr("dscheck.commit.parts.READ_BYTES", 100)
    storage = storage_of()
    direct = Direct(storage)
    wanted = [Part("plans/a.arrow", at, 10) for at in (0, 30, 70, 80, 200, 190)] + [Part("plans/b.arrow", 200, 10)]
    assert list(direct(wanted)) == [KEYS[key][at : at + size] for key, at, size in wanted]
    reads = [(op.key[6], op.offset, op.nbytes) for op in storage.log if op.name == "read"]
    assert reads == [("a", 0, 40), ("a", 70, 20), ("a", 200, 10), ("a", 190, 10), ("b", 200, 10)]
    assert direct.nbytes == 90
