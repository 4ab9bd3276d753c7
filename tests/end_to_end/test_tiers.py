"""Two tiers: committed near, uploaded in the background, loaded from the nearest whole copy (docs/tiers.md)."""

from __future__ import annotations

import errno
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dscheck import Checkpointer, CheckpointExistsError, ConfigError, DeadlineError, Keep, StorageError, Tier, sharded
from dscheck.commit import StepRef, read_history
from dscheck.commit.contents import Contents
from dscheck.commit.verify import verify
from dscheck.errors import RankFailureError, SupersededError
from dscheck.manifest.keys import data_key, record_key
from dscheck.ranks.base import Ranks
from dscheck.storage import MemoryStorage, Storage
from dscheck.testing.faults import MUTATING, Faulty, crash_after, fail_at, hang, slow
from tests.end_to_end.worlds import job, open_on, outcomes

ROWS = 3000


def state_of(rank: int, step: int, world: int = 2) -> dict[str, Any]:
    """Two ranks hold half of a tensor each, one holds all of it."""
    local = torch.full((2 * ROWS // world,), float(10 * step + rank))
    return {"w": sharded(local, (2 * ROWS,), (ROWS * rank,)), "n": step}


def shard(state: dict[str, Any]) -> float:
    """The value that all elements of a rank's shard have."""
    values = set(state["w"].local.tolist())
    assert len(values) == 1
    return float(values.pop())


def fill(state: dict[str, Any], rank: int, step: int) -> None:
    state["w"].local.fill_(10 * step + rank)
    state["n"] = step


Roots = Callable[[int], Any]


def train(
    roots: Roots,
    steps: tuple[int, ...],
    *,
    world: int = 2,
    at: int | None = None,
    durable: bool = True,
    **settings: Any,
) -> list[Any]:
    """A job that loads (step `at`, or the newest), and saves `steps`; per rank its handles."""

    def run(ranks: Ranks) -> Any:
        state = state_of(ranks.rank, 0, world)
        with open_on(ranks, roots(ranks.rank), state, **settings) as ckpt:
            if not settings.get("fresh"):
                ckpt.load(at)
            handles = []
            for step in steps:
                fill(state, ranks.rank, step)
                handles.append(ckpt.save(step))
                handles[-1].wait()
                if durable:
                    handles[-1].wait_durable()
            return handles

    return job(world, run)


def load(roots: Roots, world: int = 2, step: int | None = None) -> list[tuple[int | None, float, str]]:
    """Per rank the step loaded, what the shard holds, and the root it came from."""

    def run(ranks: Ranks) -> tuple[int | None, float, str]:
        state = state_of(ranks.rank, 0, world)
        with open_on(ranks, roots(ranks.rank), state) as ckpt:
            found = ckpt.load(step)
            return found, shard(state), "" if ckpt.loaded is None else ckpt.loaded.root

    return job(world, run)


def whole(root: Storage) -> list[int]:
    """The visible steps, of which none is damaged."""
    history = read_history(root)
    for ref in history.visible:
        record = history.resolve(ref.step)
        assert record is not None
        assert not [*verify(Contents.open(root, record), lambda nbytes: None)]
    return [ref.step for ref in history.visible]


class Places:
    """A shared tier, and a near one: one for all, or one a node, with one rank each."""

    def __init__(self, node_local: bool, nodes: int = 2) -> None:
        self.node_local = node_local
        self.keep: tuple[Any, Any] = (None, None)
        self.shared: Storage = MemoryStorage()
        self.near: list[Storage] = [MemoryStorage() for _ in range(nodes if node_local else 1)]

    def near_of(self, rank: int) -> Storage:
        return self.near[rank if self.node_local else 0]

    def __call__(self, rank: int) -> list[Any]:
        return [Tier(self.near_of(rank), self.node_local, self.keep[0]), Tier(self.shared, keep=self.keep[1])]


@pytest.fixture(params=[False, True], ids=["near tier of all", "near tier of each node"])
def places(request: pytest.FixtureRequest) -> Places:
    return Places(request.param)


def test_a_step_is_committed_near_then_shared(places: Places) -> None:
    """commit P36"""
    handles = train(places, (1, 2))
    assert whole(places.shared) == [1, 2]
    for rank, (first, _) in enumerate(handles):
        assert first.durable
        assert 0 < first.stats.committed_s <= first.stats.durable_s
        assert first.stats.uploaded_bytes == len(places.shared.read(data_key(1, 1, rank)))
        assert [ref.step for ref in read_history(places.near_of(rank)).visible] == [1, 2]
    near = places.near_of(0)
    for key in ("terms/1.json", record_key(1, 1), record_key(2, 1)):
        assert near.read(key) == places.shared.read(key)


def test_a_load_takes_the_near_copy(places: Places) -> None:
    train(places, (1, 2))
    watched = Faulty(places.shared)
    places.shared = watched
    assert load(places) == [(2, 20.0 + rank, places.near_of(rank).url) for rank in range(2)]
    assert not [op for op in watched.log if op.key.startswith(("steps/", "plans/"))]


def test_wait_means_near_and_an_upload_that_hangs_holds_nothing_up(places: Places) -> None:
    let_go = threading.Event()
    both = threading.Barrier(2)
    places.shared = Faulty(places.shared, hang(let_go, "write", "steps/1/*"))

    def run(ranks: Ranks) -> Any:
        state = state_of(ranks.rank, 1)
        with open_on(ranks, places(ranks.rank), state) as ckpt:
            first = ckpt.save(1)
            first.wait()
            second = ckpt.save(2)
            second.wait()
            assert not first.durable
            with pytest.raises(DeadlineError, match="step 1 was not uploaded within"):
                first.wait_durable(0.1)
            both.wait(30)
            let_go.set()
            second.wait_durable()
            assert first.durable
        return first

    job(2, run)
    assert whole(places.shared) == [1, 2]


def test_a_rank_that_leaves_by_an_exception_ends_the_uploads_of_all(places: Places) -> None:
    """No rank waits for the deadline of an upload, which is an hour here: C7."""
    began = time.monotonic()

    def run(ranks: Ranks) -> None:
        state = state_of(ranks.rank, 1)
        with open_on(ranks, places(ranks.rank), state) as ckpt:
            ckpt.save(1).wait_durable()
            if ranks.rank == 1:
                raise KeyboardInterrupt
            second = ckpt.save(2)
            with pytest.raises(RankFailureError, match="training ended by an exception"):
                second.wait()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = outcomes(2, run)
    assert [type(one) for one in found] == [type(None), KeyboardInterrupt]
    assert time.monotonic() - began < 25
    assert whole(places.shared) == [1]


def test_a_failed_upload_is_told_and_tried_again_with_the_next_save(places: Places) -> None:
    """commit P36"""
    places.shared = Faulty(places.shared, fail_at("write", "steps/1/*", error=errno.ENOSPC))

    def run(ranks: Ranks) -> Any:
        state = state_of(ranks.rank, 1)
        with open_on(ranks, places(ranks.rank), state) as ckpt:
            first = ckpt.save(1)
            first.wait()
            with pytest.raises((StorageError, RankFailureError), match="No space left"):
                first.wait_durable()
            assert not first.durable
            assert first.upload_error is not None
            second = ckpt.save(2)
            second.wait_durable()
            assert first.durable
            assert first.upload_error is None

    with pytest.warns(RuntimeWarning, match="is tried again with the next save"):
        job(2, run)
    assert whole(places.shared) == [1, 2]


def test_a_restart_ends_an_interrupted_upload_before_its_claim(places: Places) -> None:
    """commit P36"""
    shared = places.shared
    places.shared = Faulty(shared, fail_at("commit", "steps/2/*", times=None))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(places, (1, 2), durable=False)
    assert whole(shared) == [1]
    places.shared = watched = Faulty(shared)
    assert [found for found, _, _ in load(places)] == [2, 2]
    assert not [op for op in watched.log if op.name in MUTATING], "a job that only loads writes nothing"
    train(places, (3,))
    assert whole(shared) == [1, 2, 3]
    puts = [op.key for op in watched.log if op.name == "put_if_absent"]
    assert puts.index(record_key(2, 1)) < puts.index("terms/2.json")


def test_another_number_of_ranks_ends_an_interrupted_upload() -> None:
    places = Places(False)
    shared = places.shared
    places.shared = Faulty(shared, fail_at("commit", "steps/1/*", times=None))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(places, (1,), durable=False)
    places.shared = shared
    train(places, (2,), world=1)
    assert whole(shared) == [1, 2]


def test_ranks_that_have_changed_nodes_first_upload_what_lies_there_alone() -> None:
    """commit P36, P37"""
    places = Places(True)
    shared = places.shared
    places.shared = Faulty(shared, fail_at("commit", "steps/2/*", times=None))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(places, (1, 2), durable=False)
    places.near = places.near[::-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = outcomes(2, lambda ranks: open_on(ranks, places(ranks.rank), state_of(ranks.rank, 0)).load())
    assert all(isinstance(one, StorageError | RankFailureError) and "injected" in str(one) for one in found), found
    places.shared = shared
    with pytest.warns(RuntimeWarning, match="after its upload to the shared tier"):
        assert [one[:2] for one in load(places)] == [(2, 20.0), (2, 21.0)]
    assert whole(shared) == [1, 2]


def test_what_another_node_wrote_is_read_from_the_shared_tier() -> None:
    """commit P37"""
    places = Places(True)

    def run(ranks: Ranks, loads: bool) -> tuple[float, float, str]:
        state = state_of(ranks.rank, 0 if loads else 4) | {"b": torch.full((5,), 0.0 if loads else 7.0)}
        with open_on(ranks, places(ranks.rank), state) as ckpt:  # both ranks claim b, one writes it
            if loads:
                ckpt.load()
            else:
                ckpt.save(1).wait_durable()
            return float(state["b"].sum()), shard(state), "" if ckpt.loaded is None else ckpt.loaded.root

    job(2, lambda ranks: run(ranks, False))
    places.shared = watched = Faulty(places.shared)
    found = job(2, lambda ranks: run(ranks, True))
    assert found == [(35.0, 40.0 + rank, places.near[rank].url) for rank in range(2)]
    read = sum(op.nbytes for op in watched.log if op.key.startswith("steps/"))
    assert 0 < read < 1000, "all but b is near"


def test_a_damaged_near_copy_falls_back_loudly(places: Places) -> None:
    """commit P37"""
    train(places, (1, 2))
    key = data_key(2, 1, 1)
    near = places.near_of(1)
    data = bytearray(near.read(key))
    data[500] ^= 1
    near.delete(key)
    writer = near.create(key)
    writer.write(bytes(data))
    writer.commit()
    with pytest.warns(RuntimeWarning, match="step 2: not all ranks could load it from memory://"):
        found = load(places)
    assert found == [(2, 20.0 + rank, places.shared.url) for rank in range(2)]


def test_a_near_copy_without_a_file_falls_back() -> None:
    """commit P37"""
    places = Places(False)
    train(places, (1, 2))
    places.near[0].delete(data_key(2, 1, 0))
    with pytest.warns(RuntimeWarning, match="not all ranks could load it from"):
        assert [found[2] for found in load(places)] == [places.shared.url] * 2


def test_a_step_that_lies_damaged_in_the_near_tier_alone_is_an_error_and_never_uploaded(places: Places) -> None:
    """commit P37: C15"""
    shared = places.shared
    places.shared = Faulty(shared, fail_at("commit", "steps/2/*", times=None))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(places, (1, 2), durable=False)
        places.shared = shared
        places.near_of(0).delete(data_key(2, 1, 0))
        found = outcomes(2, lambda ranks: open_on(ranks, places(ranks.rank), state_of(ranks.rank, 0)).load())
        assert all(isinstance(one, Exception) for one in found)
        train(places, (3,), at=1)
    assert whole(shared) == [1, 3]


def test_the_newest_step_wins_over_nearness() -> None:
    """commit P37: the shared tier is ahead of the near one."""
    here, there = Places(False), Places(False)
    there.shared = here.shared
    train(here, (1,))
    train(there, (2,))
    assert [found[:1] + found[2:] for found in load(here)] == [(2, here.shared.url)] * 2
    train(here, (3,))
    assert whole(here.shared) == [1, 2, 3]
    assert read_history(here.near[0]).newest_term == 3
    assert [ref.step for ref in read_history(here.near[0]).visible] == [1, 3]


def test_a_new_shared_tier_gets_all_that_the_near_one_has() -> None:
    """commit P36: the near tier is ahead of the shared one."""
    places = Places(False)
    train(lambda rank: places.near[0], (1, 2))
    assert [found[0] for found in load(places)] == [2, 2]
    train(places, (3,))
    assert whole(places.shared) == [1, 2, 3]


def test_a_node_that_is_new_and_empty_takes_the_shared_tier() -> None:
    """commit P37"""
    places = Places(True)
    train(places, (1, 2))
    places.near[1] = MemoryStorage()
    assert load(places) == [(2, 20.0 + rank, places.shared.url) for rank in range(2)]
    train(places, (3,))
    assert load(places) == [(3, 30.0 + rank, places.near[rank].url) for rank in range(2)]


def test_a_step_that_only_some_nodes_hold_does_not_count() -> None:
    """commit P37"""
    places = Places(True)
    train(places, (1,))
    places.near[1] = Faulty(places.near[1], fail_at("put_if_absent", "records/2-*"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = outcomes(2, lambda ranks: _try(ranks, places, 2))
    assert found == ["failed", "failed"]
    assert places.near[0].read(record_key(2, 2))
    assert [one[0] for one in load(places)] == [1, 1]
    assert whole(places.shared) == [1]


def _try(ranks: Ranks, places: Places, step: int) -> str:
    state = state_of(ranks.rank, 0)
    with open_on(ranks, places(ranks.rank), state) as ckpt:
        ckpt.load()
        handle = ckpt.save(step)
        handle.join(30)
        return "failed" if handle.error is not None else "committed"


def test_a_job_that_lost_the_shared_tier_to_a_newer_one_stops(places: Places) -> None:
    """commit P36: C2"""
    other = Places(False)
    other.shared = places.shared
    step_2, taken = threading.Barrier(3), threading.Event()

    def run(ranks: Ranks) -> Any:
        state = state_of(ranks.rank, 1)
        with open_on(ranks, places(ranks.rank), state) as ckpt:
            ckpt.save(1).wait_durable()
            step_2.wait(30)
            assert taken.wait(30)
            late = ckpt.save(2)
            late.wait()
            with pytest.raises(SupersededError, match="another job has taken over"):
                late.wait_durable()
            last = ckpt.save(3)
            with pytest.raises(SupersededError):
                last.wait()

    def overtake() -> None:
        step_2.wait(30)
        train(other, (2,))
        taken.set()

    thread = threading.Thread(target=overtake)
    thread.start()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        job(2, run)
    thread.join()
    assert [(ref.step, ref.term) for ref in read_history(places.shared).visible] == [(1, 1), (2, 2)]


def test_another_runs_near_tier_is_refused_by_name(places: Places) -> None:
    """commit P37"""
    other = Places(places.node_local)
    train(places, (1,))
    train(other, (1,))
    places.near = other.near
    found = outcomes(2, lambda ranks: open_on(ranks, places(ranks.rank), state_of(ranks.rank, 0)))
    assert all(isinstance(one, SupersededError) and "hold different histories" in str(one) for one in found)


def test_fresh_starts_anew_in_both_tiers(places: Places) -> None:
    train(places, (5,))
    with pytest.raises(CheckpointExistsError):
        job(2, lambda ranks: open_on(ranks, places(ranks.rank), state_of(ranks.rank, 0)).save(1))
    train(places, (1,), fresh=True)
    assert whole(places.shared) == [1]
    assert [found[0] for found in load(places)] == [1, 1]
    assert read_history(places.near_of(0)).newest == StepRef(1, 2)


def test_a_rollback_takes_effect_in_both_tiers(places: Places) -> None:
    train(places, (1, 2, 3))
    train(places, (4,), at=1)
    assert whole(places.shared) == [1, 4]
    assert [ref.step for ref in read_history(places.near_of(0)).visible] == [1, 4]


@pytest.mark.parametrize("lands", ["none", "all"])
def test_a_crash_at_any_operation_of_an_upload_leaves_whole_steps_and_the_next_job_ends_it(
    places: Places, lands: Any
) -> None:
    """commit P36: C1, C3"""
    for count in range(0, 60, 5 if places.node_local else 3):
        now = Places(places.node_local)
        train(now, (1,))
        shared = now.shared
        now.shared = Faulty(shared, crash_after(count, lands=lands))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcomes(2, lambda ranks: _crashing(ranks, now))  # noqa: B023
        assert 1 in whole(shared)
        now.shared = shared
        kept = {found[0] for found in load(now)}
        train(now, (9,))
        assert whole(shared) == [step for step in (1, 2, 3) if step <= max(kept)] + [9]
        assert len(kept) == 1


def _crashing(ranks: Ranks, places: Places) -> None:
    state = state_of(ranks.rank, 0)
    with open_on(ranks, places(ranks.rank), state, timeout_s=3.0, upload_timeout_s=3.0) as ckpt:
        ckpt.load()
        for step in (2, 3):
            fill(state, ranks.rank, step)
            ckpt.save(step).join(10)


def test_a_shared_tier_that_is_slow_holds_up_neither_saves_nor_their_order() -> None:
    places = Places(False)
    inner = places.shared
    places.shared = watched = Faulty(inner, slow(0.2, "commit", "steps/*"))
    began = time.monotonic()
    handles = train(places, (1, 2, 3), durable=False)
    assert all(handle.stats.committed_s < 2 for rank in handles for handle in rank)
    assert time.monotonic() - began >= 0.6
    records = [op.key for op in watched.log if op.name == "put_if_absent" and op.key.startswith("records/")]
    assert records == [record_key(step, 1) for step in (1, 2, 3)]


def test_wrong_tiers_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="3 roots: expected one, or a near tier and the shared one"):
        Checkpointer(["memory://a", "memory://b", "memory://c"], {})
    with pytest.raises(ConfigError, match="is declared as local to a node, and nothing comes behind it"):
        Checkpointer([Tier("memory://a", node_local=True)], {})
    with pytest.raises(ConfigError, match="both tiers are 'memory://a'"):
        Checkpointer(["memory://a", "memory://a"], {})


def test_each_tier_keeps_what_it_is_told(places: Places) -> None:
    places.keep = (1, Keep(last=2, every=2))
    train(places, (1, 2, 3, 4, 5))
    assert whole(places.shared) == [2, 4, 5]
    for near in places.near:
        assert [ref.step for ref in read_history(near).visible] == [5]
        assert {entry.key.split("/")[1] for entry in near.list("steps/")} == {"5"}
    assert [found[0] for found in load(places)] == [5, 5]
    assert [found[0] for found in load(places, step=2)] == [2, 2]
    train(places, (6,))
    assert whole(places.shared) == [2, 4, 5, 6]


def test_the_setting_keep_is_that_of_both_tiers(places: Places) -> None:
    train(places, (1, 2, 3), keep=2)
    assert whole(places.shared) == [2, 3]
    assert [ref.step for ref in read_history(places.near_of(0)).visible] == [2, 3]


def test_what_waits_for_its_upload_is_not_deleted(places: Places) -> None:
    places.keep = (1, None)
    shared = places.shared
    places.shared = Faulty(shared, fail_at("commit", "steps/1/*", times=3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(places, (1, 2, 3, 4), durable=False)
    assert whole(shared) == [1, 2, 3, 4]
    assert [ref.step for ref in read_history(places.near_of(0)).visible] == [4]


def test_a_wrong_keep_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="keep=0: expected at least 1"):
        Tier("memory://a", keep=0)
