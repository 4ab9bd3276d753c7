"""What save() and load() accept, refuse and promise, over ranks as threads."""

from __future__ import annotations

import errno
import threading
import time
from typing import Any

import pytest
import torch

from dscheck import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    ConfigError,
    DeadlineError,
    IncompleteCoverError,
    RankFailureError,
    SaveSkippedError,
    StateError,
    StateMismatchError,
    SupersededError,
    UnusableStateError,
    per_rank,
    sharded,
)
from dscheck.commit import read_history
from dscheck.commit.contents import Contents
from dscheck.errors import DscheckError
from dscheck.ranks.base import Ranks
from dscheck.testing.faults import Faulty, fail_at, hang, slow
from tests.end_to_end.worlds import fresh, job, load, open_on, outcomes, save

pytestmark = pytest.mark.filterwarnings("ignore:dscheck:RuntimeWarning")


def plan_of(root: Any) -> Any:
    record = read_history(root).resolve(None)
    assert record is not None
    return Contents.open(root, record).plan.whole()


def test_a_fresh_root_loads_nothing_and_says_none() -> None:
    root = fresh()

    def run(ranks: Ranks) -> Any:
        with open_on(ranks, root, {"x": torch.ones(2)}) as ckpt:
            return ckpt.load(), ckpt.latest(), ckpt.steps(), ckpt.loaded

    assert job(2, run) == [(None, None, [], None)] * 2
    assert list(root.list("")) == []


def test_saving_over_commits_without_a_load_is_refused_unless_fresh() -> None:
    root = fresh()
    save(root, 5, [{"x": torch.ones(2)}])

    def run(ranks: Ranks) -> None:
        with open_on(ranks, root, {"x": torch.zeros(2)}) as ckpt, pytest.raises(CheckpointExistsError, match="load"):
            ckpt.save(6)

    def start_over(ranks: Ranks) -> None:
        with open_on(ranks, root, {"x": torch.zeros(2)}, fresh=True) as ckpt:
            ckpt.save(2).wait()
            assert ckpt.steps() == [2]

    job(1, run)
    job(1, start_over)


@pytest.mark.parametrize("step", [3, 2, -1, True, 4.0, "5"])
def test_a_step_must_be_an_int_that_exceeds_the_last_one(step: Any) -> None:
    root = fresh()

    def run(ranks: Ranks) -> None:
        with open_on(ranks, root, {"x": torch.ones(2)}) as ckpt:
            ckpt.save(3).wait()
            with pytest.raises(ConfigError):
                ckpt.save(step)
            ckpt.save(4).wait()

    job(2, run)


def test_after_a_load_in_mid_run_the_abandoned_steps_stay_abandoned() -> None:
    """Invariant C2, TRAPS 29: after load(300) with 400 and 500 present, saving 310 must not leave 500 the newest."""
    root = fresh()
    value = torch.zeros(1)

    def run(ranks: Ranks) -> None:
        with open_on(ranks, root, {"x": value}) as ckpt:
            for step in (300, 400, 500):
                value.fill_(step)
                ckpt.save(step).wait()
            assert ckpt.load(300) == 300
            assert value.item() == 300
            ckpt.save(310).wait()
            assert ckpt.steps() == [300, 310]
            assert ckpt.latest() == 310
            with pytest.raises(DscheckError, match="term"):
                ckpt.load(500)

    job(1, run)


def test_a_step_that_failed_is_tried_again_in_the_next_term() -> None:
    root = fresh()
    fault = fail_at("write", "steps/2/*", error=errno.ENOSPC)

    def run(ranks: Ranks) -> None:
        with open_on(ranks, Faulty(root, fault) if ranks.rank else root, {"x": torch.ones(2)}) as ckpt:
            ckpt.save(1).wait()
            with pytest.raises(DscheckError):
                ckpt.save(2).wait()
            ckpt.save(2).wait()
            ckpt.save(3).wait()
            assert ckpt.steps() == [1, 2, 3]

    job(2, run)
    assert {entry.key for entry in root.list("records/")} == {
        f"records/{s}-{t}.json" for s, t in ((1, 1), (2, 2), (3, 2))
    }


def test_an_older_job_stops_saving_when_a_newer_one_has_the_root() -> None:
    root = fresh()

    def run(ranks: Ranks) -> None:
        with open_on(ranks, root, {"x": torch.ones(2)}) as old:
            old.save(1).wait()
            newer = {"x": torch.zeros(2)}
            job(1, lambda other: _take_over(other, root, newer))
            with pytest.raises(SupersededError, match="term"):
                old.save(2).wait()
            with pytest.warns(RuntimeWarning, match="not saved"):
                assert isinstance(old.save(3).error, SupersededError)

    job(1, run)
    assert load(root, [{"x": torch.zeros(2)}])[0].step == 7


def _take_over(ranks: Ranks, root: Any, state: dict[str, Any]) -> None:
    with open_on(ranks, root, state) as ckpt:
        ckpt.load()
        ckpt.save(7).wait()


def test_ranks_that_save_different_steps_are_refused_with_both_named() -> None:
    root = fresh()

    def run(ranks: Ranks) -> None:
        with open_on(ranks, root, {"x": torch.ones(2)}) as ckpt:
            ckpt.save(10 + ranks.rank).wait()

    for outcome in outcomes(2, run):
        assert isinstance(outcome, ConfigError)
        assert "step 10" in str(outcome)
        assert "step 11" in str(outcome)


def test_a_state_that_one_rank_cannot_store_fails_the_others_with_its_name() -> None:
    root = fresh()

    def run(ranks: Ranks) -> None:
        state: dict[str, Any] = {"x": torch.ones(2)}
        if ranks.rank == 1:
            state["bad"] = object()
        with open_on(ranks, root, state) as ckpt:
            ckpt.save(1).wait()

    found = outcomes(3, run)
    assert isinstance(found[1], StateError)
    assert "bad" in str(found[1])
    for rank in (0, 2):
        assert isinstance(found[rank], RankFailureError)
        assert "rank 1" in str(found[rank])
    assert list(root.list("records/")) == []


def test_a_rank_that_never_saves_is_named_when_the_deadline_passes() -> None:
    root = fresh()

    def run(ranks: Ranks) -> float:
        ckpt = open_on(ranks, root, {"x": torch.ones(2)}, timeout_s=1.0)
        if ranks.rank == 2:
            time.sleep(3)
            return 0.0
        began = time.monotonic()
        with pytest.raises(DeadlineError, match="2"):
            ckpt.save(1).wait()
        return time.monotonic() - began

    assert max(job(3, run)) < 1.0 + 5.0


def test_leaving_by_an_exception_tells_the_others_and_does_not_wait() -> None:
    root = fresh()
    let_go = threading.Event()

    def run(ranks: Ranks) -> Any:
        storage = Faulty(root, slow(0.3, "write", "steps/*")) if ranks.rank == 1 else root
        try:
            with open_on(ranks, storage, {"x": torch.full((1000,), 1.0 * ranks.rank)}, replicas="first") as ckpt:
                handle = ckpt.save(1)
                if ranks.rank == 1:
                    raise KeyError("training broke")
                handle.wait()
        finally:
            let_go.set()

    found = outcomes(2, run)
    assert isinstance(found[1], KeyError)
    assert isinstance(found[0], RankFailureError | type(None))


MANY = 1 << 20
"""Elements of a tensor that fills the host memory of a capture for as long as its write hangs."""


def test_a_save_goes_on_at_once_while_an_earlier_one_is_committed() -> None:
    root = fresh()

    def run(ranks: Ranks) -> Any:
        storage = Faulty(root, slow(0.2, "commit"))
        with open_on(ranks, storage, {"x": torch.ones(2)}, host_memory_bytes=1 << 20) as ckpt:
            ckpt.save(1).wait()
            handles = [ckpt.save(step) for step in (2, 3, 4)]
            for handle in handles:
                handle.wait()
            return [handle.stats.in_flight for handle in handles], handles[-1].stats.stall_s, ckpt.steps()

    in_flight, stall, steps = job(1, run)[0]
    assert in_flight == [1, 2, 3]
    assert stall["storage"] + stall["commit"] < 0.1
    assert steps == [1, 2, 3, 4]


def test_a_save_without_room_waits_by_default_and_counts_the_stall() -> None:
    root = fresh()

    def run(ranks: Ranks) -> Any:
        with open_on(ranks, Faulty(root, slow(0.2, "write")), {"x": torch.ones(MANY)}) as ckpt:
            ckpt.save(1).wait()
            ckpt.save(2)
            second = ckpt.save(3)
            second.wait()
            return second.stats.stall_s["storage"], ckpt.steps()

    stall, steps = job(1, run)[0]
    assert stall > 0.1
    assert steps == [1, 2, 3]


@pytest.mark.parametrize("busy", [{1}, {0, 1}])
def test_a_busy_rank_skips_on_all_ranks_when_asked(busy: set[int]) -> None:
    """At once where all are busy; a rank that is not hears of it when its own earlier save has ended."""
    root = fresh()
    let_go = threading.Event()

    def run(ranks: Ranks) -> list[int]:
        storage = Faulty(root, hang(let_go, "write", "steps/1/*")) if ranks.rank in busy else root
        state = {"x": sharded(torch.ones(MANY), (2 * MANY,), (MANY * ranks.rank,))}
        with open_on(ranks, storage, state, when_busy="skip") as ckpt:
            first = ckpt.save(1)
            second = ckpt.save(2)
            if busy == {ranks.rank}:
                let_go.set()
            with pytest.raises(SaveSkippedError):
                second.wait(30)
            let_go.set()
            first.wait()
            ckpt.save(3).wait()
            return ckpt.steps()

    assert job(2, run) == [[1, 3]] * 2


def test_a_hung_storage_call_costs_its_deadline_and_no_more() -> None:
    """Invariant C7, and a hung helper is replaced (C8). What lies behind it ends with it."""
    root = fresh()
    never = threading.Event()

    def run(ranks: Ranks) -> Any:
        storage = Faulty(root, hang(never, "commit", "steps/1/*"))
        with open_on(ranks, storage, {"x": torch.ones(2)}, timeout_s=0.5) as ckpt:
            first, second = ckpt.save(1), ckpt.save(2)
            with pytest.raises(DeadlineError):
                first.wait()
            ckpt.save(3).wait()
            assert isinstance(first.error, DeadlineError)
            assert second.error is first.error
            assert ckpt.steps() == [3]
        never.set()

    job(1, run)


def test_a_failed_save_warns_and_is_raised_at_the_next_call_when_asked() -> None:
    root = fresh()

    def run(ranks: Ranks) -> None:
        storage = Faulty(root, fail_at("write", "steps/1/*", error=errno.ENOSPC))
        with open_on(ranks, storage, {"x": torch.ones(2)}, on_failure="raise") as ckpt:
            first = ckpt.save(1)
            first.join(10)
            with pytest.raises(DscheckError, match="No space left"):
                ckpt.save(2)
            ckpt.save(3).wait()

    job(1, run)


def test_ranks_that_differ_under_one_name_are_refused_with_the_ways_out() -> None:
    """Invariant C14, TRAPS 4: splitting false replicas between writers would build a hybrid."""
    found = outcomes(2, lambda ranks: _save_one(ranks, fresh_root, {"x": torch.full((9,), float(ranks.rank))}))
    for outcome in found:
        assert isinstance(outcome, StateError)
        for word in ("'x'", "per_rank", "sharded", 'replicas="first"'):
            assert word in str(outcome)


fresh_root = fresh()


def _save_one(ranks: Ranks, root: Any, state: dict[str, Any], **settings: Any) -> None:
    with open_on(ranks, root, state, **settings) as ckpt:
        ckpt.save(1).wait()


def test_replicas_first_stores_the_lowest_rank() -> None:
    root = fresh()
    job(3, lambda ranks: _save_one(ranks, root, {"x": torch.full((9,), float(ranks.rank))}, replicas="first"))
    state = {"x": torch.ones(9)}
    load(root, [state])
    assert state["x"].tolist() == [0.0] * 9


def test_one_name_with_other_shapes_is_refused() -> None:
    """Pipeline stages numbered locally, rank-local experts (TRAPS 4)."""
    root = fresh()
    found = outcomes(2, lambda ranks: _save_one(ranks, root, {"x": torch.zeros(3 + ranks.rank)}))
    assert all(isinstance(outcome, StateError) and "per_rank" in str(outcome) for outcome in found)


def test_shards_that_overlap_or_leave_a_gap_are_refused_by_name() -> None:
    for start, kind in ((1, StateError), (3, IncompleteCoverError)):
        root = fresh()

        def run(ranks: Ranks, root: Any = root, start: int = start) -> None:
            offset = start if ranks.rank else 0
            stop = 5 if ranks.rank else 2
            _save_one(ranks, root, {"w": sharded(torch.zeros(stop - offset), (5,), (offset,))})

        for outcome in outcomes(2, run):
            assert isinstance(outcome, kind)
            assert "'w'" in str(outcome)


def test_equal_claims_are_written_once() -> None:
    root = fresh()
    big = torch.arange(400_000, dtype=torch.float32)

    def run(ranks: Ranks) -> list[int]:
        with open_on(ranks, root, {"x": big.clone(), "n": 3}) as ckpt:
            first, second = ckpt.save(1), ckpt.save(2)
            second.wait()
            return [first.stats.bytes, second.stats.bytes]

    moved = job(4, run)
    assert sum(size for _, size in moved) == big.nbytes  # from the second save on the losers do not even capture it
    assert sum(fragment.nbytes for fragment in plan_of(root).fragments) == big.nbytes


def test_a_steady_state_save_exchanges_a_digest_and_a_few_counters() -> None:
    """Invariant C10: whatever the number of tensors; the claims travel once."""
    root = fresh()
    sent: list[tuple[str, int]] = []

    class Counting:
        def __init__(self, ranks: Ranks) -> None:
            self._ranks, self.rank, self.size = ranks, ranks.rank, ranks.size

        def exchange(self, round: str, mine: Any, decide: Any, **rest: Any) -> bytes:
            answer = self._ranks.exchange(round, mine, decide, **rest)
            sent.append((round, max(len(mine.payload), len(answer))))
            return answer

        def close(self) -> None:
            self._ranks.close()

    def run(ranks: Ranks) -> None:
        state = {f"t{i}": sharded(torch.ones(2), (4,), (2 * ranks.rank,)) for i in range(500)}
        with open_on(Counting(ranks), root, state) as ckpt:
            for step in (1, 2, 3):
                ckpt.save(step).wait()

    job(2, run)
    first = max(size for round, size in sent if round == "save-1/plan")
    later = max(size for round, size in sent if round in ("save-2/plan", "save-3/plan", "save-2/arrive"))
    assert later < 300
    assert first > 4 * later


def test_a_state_of_another_model_is_refused_with_both_shapes() -> None:
    root = fresh()
    save(root, 1, [{"x": torch.ones(2, 3), "y": torch.ones(4)}])
    state = {"x": torch.zeros(3, 2), "y": torch.zeros(4, dtype=torch.float64)}
    with pytest.raises(StateMismatchError) as caught:
        load(root, [state])
    for text in ("float32[2, 3]", "float32[3, 2]", "float32[4]", "float64[4]"):
        assert text in str(caught.value)
    assert state["x"].sum() == 0


def test_dtypes_convert_only_when_asked() -> None:
    root = fresh()
    save(root, 1, [{"x": torch.tensor([1.5, 2.5])}])
    state = {"x": torch.zeros(2, dtype=torch.bfloat16)}
    load(root, [state], convert_dtype=True)
    assert state["x"].tolist() == [1.5, 2.5]


def test_strict_false_reports_missing_and_unexpected() -> None:
    root = fresh()
    save(root, 1, [{"m": {"a": torch.ones(2), "b": torch.ones(3)}}])
    state = {"m": {"a": torch.zeros(2), "c": torch.zeros(4)}}
    with pytest.raises(StateMismatchError):
        load(root, [state])
    report = load(root, [state], strict=False)[0]
    assert report.missing == ("m.c",)
    assert report.unexpected == ("m.b",)
    assert state["m"]["a"].tolist() == [1, 1]


def test_only_loads_parts_and_leaves_the_rest() -> None:
    root = fresh()
    save(root, 1, [{"a": torch.ones(2), "b": torch.ones(2)}])
    state = {"a": torch.zeros(2), "b": torch.zeros(2)}
    load(root, [state], only=["a"])
    assert (state["a"].tolist(), state["b"].tolist()) == ([1, 1], [0, 0])


def test_a_step_that_does_not_exist_is_an_error_and_changes_nothing() -> None:
    root = fresh()
    save(root, 1, [{"x": torch.ones(2)}])
    with pytest.raises(CheckpointNotFoundError, match="7"):
        load(root, [{"x": torch.zeros(2)}] * 1, step=7)


def test_after_a_load_that_failed_half_way_save_refuses_until_one_succeeds() -> None:
    """Invariant C6."""
    root = fresh()
    states = [{"x": torch.full((3,), 1.0)} for _ in range(2)]
    save(root, 1, states)

    def run(ranks: Ranks) -> None:
        fault = fail_at("read_into", "steps/1/*")
        with open_on(ranks, Faulty(root, fault) if ranks.rank else root, {"x": torch.zeros(3)}) as ckpt:
            with pytest.raises(DscheckError):
                ckpt.load()
            with pytest.raises(UnusableStateError, match="load"):
                ckpt.save(2)
            assert ckpt.load() == 1
            ckpt.save(2).wait()

    job(2, run)


def test_per_rank_objects_come_back_to_their_rank_and_are_refused_on_others() -> None:
    root = fresh()
    save(root, 1, [{"p": per_rank({"position": 10 + rank})} for rank in range(2)])
    states = [{"p": per_rank({"position": 0})} for _ in range(2)]
    load(root, states)
    assert [state["p"].value["position"] for state in states] == [10, 11]
    with pytest.raises(StateMismatchError, match="'p'"):
        load(root, [{"p": per_rank({"position": 0})}])


def test_objects_that_differ_go_back_to_their_rank_or_are_an_error_by_name() -> None:
    root = fresh()
    save(root, 1, [{"n": rank, "x": torch.ones(1)} for rank in range(2)])
    states: list[dict[str, Any]] = [{"n": -1, "x": torch.ones(1)} for _ in range(2)]
    load(root, states)
    assert [state["n"] for state in states] == [0, 1]
    with pytest.raises(StateMismatchError, match="'n'"):
        load(root, [{"n": -1, "x": torch.ones(1)}])


def test_unknown_settings_and_bad_values_are_one_clear_error() -> None:
    for bad in ({"timeout": 3}, {"timeout_s": 0}, {"when_busy": "maybe"}, {"block_bytes": 1000}):
        found = outcomes(1, lambda ranks, bad=bad: open_on(ranks, fresh(), {}, **bad))  # type: ignore[misc]
        assert isinstance(found[0], ConfigError)


def test_a_save_that_hung_and_woke_late_cannot_abandon_an_acknowledged_step() -> None:
    """Invariant C2: what a thread that was given up still does is in a term that no longer counts."""
    root = fresh()
    wake = threading.Event()

    def run(ranks: Ranks) -> list[int]:
        faults = hang(wake, "put_if_absent", "records/2-*"), fail_at("write", "steps/4/*", error=errno.ENOSPC)
        with open_on(ranks, Faulty(root, *faults), {"x": torch.ones(2)}, timeout_s=0.5) as ckpt:
            ckpt.save(1).wait()
            hung = ckpt.save(2)
            with pytest.raises(DeadlineError):
                hung.wait()
            ckpt.save(3).wait()
            assert isinstance(hung.error, DeadlineError)
            wake.set()
            time.sleep(0.3)
            with pytest.raises(DscheckError):
                ckpt.save(4).wait()
            ckpt.save(4).wait()
            return ckpt.steps()

    assert job(1, run) == [[1, 3, 4]]


def test_a_failure_while_capturing_shows_on_the_handle_and_on_the_other_ranks(monkeypatch: Any) -> None:
    """Invariant C8: memory that runs out does not kill training, and nobody waits for a deadline."""
    from dscheck.snapshot import Capturer

    take = Capturer.take

    def run(ranks: Ranks) -> tuple[Any, list[int]]:
        with open_on(ranks, root, {"x": torch.ones(2)}) as ckpt:
            ckpt.save(1).wait()
            broken.add(threading.get_ident()) if ranks.rank == 1 else None
            handle = ckpt.save(2)
            handle.join(10)
            broken.clear()
            ckpt.save(3).wait()
            return handle.error, ckpt.steps()

    def fails(self: Capturer, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() in broken:
            raise RuntimeError("out of memory (injected)")
        return take(self, *args, **kwargs)

    root, broken = fresh(), set[int]()
    monkeypatch.setattr(Capturer, "take", fails)
    began = time.monotonic()
    (first, steps), (second, _) = job(2, run)
    assert "out of memory" in str(second)
    assert isinstance(first, RankFailureError)
    assert "rank 1" in str(first)
    assert steps == [1, 3]
    assert time.monotonic() - began < 10


def test_a_hung_save_does_not_skip_for_ever() -> None:
    root = fresh()
    never = threading.Event()

    def run(ranks: Ranks) -> None:
        storage = Faulty(root, hang(never, "commit", "steps/1/*"))
        with open_on(ranks, storage, {"x": torch.ones(2)}, timeout_s=0.3, when_busy="skip") as ckpt:
            first = ckpt.save(1)
            time.sleep(0.3 + 5.2)
            ckpt.save(2).wait()
            assert isinstance(first.error, DeadlineError)
        never.set()

    job(1, run)


def test_a_partial_load_does_not_mend_a_load_that_failed_half_way() -> None:
    """Invariant C6."""
    root = fresh()
    save(root, 1, [{"x": torch.ones(3), "y": torch.ones(3)}])

    def run(ranks: Ranks) -> None:
        state = {"x": torch.zeros(3), "y": torch.zeros(3)}
        with open_on(ranks, Faulty(root, fail_at("read_into", "steps/1/*")), state) as ckpt:
            with pytest.raises(DscheckError):
                ckpt.load()
            ckpt.load(only=["x"])
            with pytest.raises(UnusableStateError):
                ckpt.save(2)
            ckpt.load()
            ckpt.save(2).wait()

    job(1, run)


@pytest.mark.parametrize("step", [True, 1.0, "1", -1, 2**63])
def test_a_step_that_is_none_is_refused_by_load_on_all_ranks_at_once(step: Any) -> None:
    root = fresh()
    save(root, 1, [{"x": torch.ones(3)}, {"x": torch.ones(3)}])

    def run(ranks: Ranks) -> None:
        with open_on(ranks, root, {"x": torch.zeros(3)}) as ckpt:
            ckpt.load(step if ranks.rank else 1)

    began = time.monotonic()
    found = outcomes(2, run)
    assert isinstance(found[1], ConfigError)
    assert isinstance(found[0], RankFailureError)
    assert time.monotonic() - began < 10


def test_names_to_load_are_a_list_and_not_one_text() -> None:
    root = fresh()
    save(root, 1, [{"m": torch.ones(3)}])
    with pytest.raises(ConfigError, match="only='m'"):
        load(root, [{"m": torch.zeros(3)}], only="m")


def test_options_that_differ_between_ranks_go_back_to_their_rank() -> None:
    """A scheduler on a local loss makes learning rates differ; the model alone loads anywhere."""
    root = fresh()

    def state(lr: float) -> dict[str, Any]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        return {"m": model, "o": torch.optim.SGD(model.parameters(), lr=lr)}

    save(root, 1, [state(0.1), state(0.2)])
    wanted = [state(1.0), state(1.0)]
    load(root, wanted)
    assert [found["o"].param_groups[0]["lr"] for found in wanted] == [0.1, 0.2]
    load(root, [{"m": state(0)["m"]}])
    load(root, [state(1.0)], only=["m"])
    with pytest.raises(StateMismatchError, match="o"):
        load(root, [state(1.0)])


def test_leaving_by_an_exception_ends_the_next_load_of_the_others() -> None:
    root = fresh()
    save(root, 1, [{"x": torch.ones(3)}, {"x": torch.ones(3)}])

    def run(ranks: Ranks) -> None:
        with open_on(ranks, root, {"x": torch.zeros(3)}) as ckpt:
            if ranks.rank == 1:
                raise KeyError("training broke")
            ckpt.load()

    began = time.monotonic()
    found = outcomes(2, run)
    assert isinstance(found[0], RankFailureError)
    assert time.monotonic() - began < 10
