"""Several saves under way at once: their order, their failures, their deadlines, and what training gets to feel."""

from __future__ import annotations

import atexit
import errno
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dscheck import (
    Checkpointer,
    ConfigError,
    DeadlineError,
    RankFailureError,
    SaveHandle,
    StateError,
    SupersededError,
    sharded,
)
from dscheck.errors import DscheckError, SaveSkippedError
from dscheck.ranks.base import Ranks
from dscheck.testing.faults import Faulty, fail_at, hang, slow
from tests.end_to_end.worlds import fresh, job, load, open_on, outcomes, save

pytestmark = pytest.mark.filterwarnings("ignore:dscheck:RuntimeWarning")

SEVERAL = {"host_memory_bytes": 64 << 20}
"""Memory for several captures of the states here."""

SOON_S = 4.0


def rows(rank: int, value: float = 1.0) -> dict[str, Any]:
    """Two rows of four."""
    return {"x": sharded(torch.full((2, 3), value), (4, 3), (2 * rank, 0))}


def planned(ckpt: Checkpointer) -> SaveHandle:
    """A first save, so that the next ones need not wait for a plan."""
    handle = ckpt.save(1)
    handle.wait()
    return handle


def test_saves_behind_one_that_hangs_commit_in_order_once_it_goes_on() -> None:
    root, let_go = fresh(), threading.Event()
    faulty = Faulty(root, hang(let_go, "write", "steps/2/*"))

    def run(ranks: Ranks) -> tuple[list[int], list[float]]:
        state = {"x": torch.zeros(5)}
        with open_on(ranks, faulty, state, **SEVERAL) as ckpt:
            planned(ckpt)
            handles = []
            for step in (2, 3, 4):
                ckpt.fence()
                state["x"].fill_(step)
                handles.append(ckpt.save(step))
            handles[-1].wait_captured()
            assert not any(handle.done for handle in handles)
            let_go.set()
            for handle in handles:
                handle.wait()
            return ckpt.steps(), [handle.began + (handle.stats.committed_s or 0) for handle in handles]

    steps, ends = job(1, run)[0]
    assert steps == [1, 2, 3, 4]
    assert ends == sorted(ends)
    for step in (2, 3, 4):
        state = {"x": torch.zeros(5)}
        load(root, [state], step)
        assert state["x"].tolist() == [float(step)] * 5


def test_a_save_that_fails_takes_none_of_those_behind_it_along() -> None:
    """Invariant C8. What is newer than the failed step has been committed: it cannot be tried again."""
    root = fresh()
    fault = fail_at("write", "steps/2/*", error=errno.ENOSPC)

    def run(ranks: Ranks) -> list[int]:
        storage = Faulty(root, fault, slow(0.1, "commit")) if ranks.rank else root
        with open_on(ranks, storage, rows(ranks.rank), **SEVERAL) as ckpt:
            planned(ckpt)
            failed, good, better = [ckpt.save(step) for step in (2, 3, 4)]
            good.wait()
            better.wait()
            assert isinstance(failed.error, DscheckError)
            with pytest.raises(ConfigError, match="step 2 does not exceed step 4"):
                ckpt.save(2)
            return ckpt.steps()

    assert job(2, run) == [[1, 3, 4]] * 2


def test_a_step_under_way_is_taken_and_one_that_failed_is_free_again() -> None:
    root, let_go = fresh(), threading.Event()
    faults = hang(let_go, "commit", "steps/2/*"), fail_at("commit", "steps/3/*", error=errno.EIO)

    def run(ranks: Ranks) -> list[int]:
        with open_on(ranks, Faulty(root, *faults), {"x": torch.ones(3)}, **SEVERAL) as ckpt:
            planned(ckpt)
            ckpt.save(2)
            failing = ckpt.save(3)
            for step in (2, 3):
                with pytest.raises(ConfigError, match="step 3, the last one"):
                    ckpt.save(step)
            let_go.set()
            assert failing.join(10)
            assert failing.error is not None
            ckpt.save(3).wait()
            return ckpt.steps()

    assert job(1, run) == [[1, 2, 3]]


def test_the_second_save_waits_for_the_first_plan_and_counts_it_as_commit() -> None:
    root, let_go = fresh(), threading.Event()
    faulty = Faulty(root, hang(let_go, "put_if_absent", "plans/*"))

    def run(ranks: Ranks) -> Any:
        with open_on(ranks, faulty, {"x": torch.ones(3)}, **SEVERAL) as ckpt:
            ckpt.save(1)
            threading.Timer(0.3, let_go.set).start()
            second = ckpt.save(2)
            second.wait()
            return second.stats

    stats = job(1, run)[0]
    assert 0.2 < stats.stall_s["commit"] < 2
    assert stats.stall_s["storage"] < 0.1
    assert stats.stall_s["call"] < 0.2


def test_a_structure_that_changes_under_way_is_planned_anew() -> None:
    root = fresh()

    def run(ranks: Ranks) -> list[int]:
        state = rows(ranks.rank)
        with open_on(ranks, Faulty(root, slow(0.05, "commit")), state, **SEVERAL) as ckpt:
            planned(ckpt)
            for step in range(2, 8):
                state[f"new{step}"] = sharded(torch.full((1, 2), 1.0 * step), (2, 2), (ranks.rank, 0))
                ckpt.save(step)
        return ckpt.steps()

    assert job(2, run) == [list(range(1, 8))] * 2
    state = {**rows(0), **{f"new{step}": torch.zeros(2, 2) for step in range(2, 8)}}
    state["x"] = torch.zeros(4, 3)
    load(root, [state])
    assert state["x"].tolist() == [[1.0] * 3] * 4
    assert all((state[f"new{step}"] == step).all() for step in range(2, 8))


def test_every_step_saved_over_slow_storage_equals_its_clone() -> None:
    root = fresh()
    clones: dict[int, dict[str, torch.Tensor]] = {}

    def model() -> dict[str, Any]:
        torch.manual_seed(1)
        net = torch.nn.Sequential(torch.nn.Linear(40, 300), torch.nn.ReLU(), torch.nn.Linear(300, 7))
        return {"net": net, "opt": torch.optim.AdamW(net.parameters(), lr=0.01)}

    def run(ranks: Ranks) -> list[int]:
        state = model()
        with open_on(ranks, Faulty(root, slow(0.02, "commit")), state, host_memory_bytes=1 << 20) as ckpt:
            for step in range(1, 31):
                state["opt"].zero_grad()
                state["net"](torch.randn(8, 40)).square().mean().backward()
                state["opt"].step()
                clones[step] = {name: value.detach().clone() for name, value in state["net"].state_dict().items()}
                ckpt.save(step)
        return ckpt.steps()

    assert job(1, run) == [list(range(1, 31))]
    for step in range(1, 31):
        state = model()
        load(root, [state], step)
        for name, value in state["net"].state_dict().items():
            assert torch.equal(value, clones[step][name]), (step, name)


def test_a_deadline_ends_all_in_flight_and_the_other_ranks_hear_of_it() -> None:
    """Invariant C7: nobody waits for the deadline of a save that another rank has given up."""
    root, never = fresh(), threading.Event()

    def run(ranks: Ranks) -> list[int]:
        storage = Faulty(root, hang(never, "commit", "steps/2/*")) if ranks.rank else root
        timeout_s = 0.5 if ranks.rank else 30.0
        with open_on(ranks, storage, rows(ranks.rank), timeout_s=timeout_s, **SEVERAL) as ckpt:
            planned(ckpt)
            began = time.monotonic()
            handles = [ckpt.save(step) for step in (2, 3, 4)]
            if ranks.rank:
                with pytest.raises(DeadlineError):
                    handles[0].wait()
                ckpt.save(5).wait()
                assert isinstance(handles[0].error, DeadlineError)
                assert {handle.error for handle in handles} == {handles[0].error}
            else:
                for handle in handles:
                    with pytest.raises(RankFailureError, match="rank 1"):
                        handle.wait()
                ckpt.save(5).wait()
            assert time.monotonic() - began < 0.5 + 5.0 + SOON_S
        return ckpt.steps()

    assert job(2, run) == [[1, 5]] * 2
    never.set()


def test_leaving_by_an_exception_ends_all_in_flight_on_all_ranks() -> None:
    root, never = fresh(), threading.Event()

    def run(ranks: Ranks) -> list[Any]:
        storage = Faulty(root, slow(0.3, "write", "steps/2/*")) if ranks.rank else root
        handles = []
        with open_on(ranks, storage, rows(ranks.rank), **SEVERAL) as ckpt:
            planned(ckpt)
            handles += [ckpt.save(step) for step in (2, 3, 4)]
            if ranks.rank:
                raise KeyError("training broke")
            for handle in handles:
                assert handle.join(SOON_S)
            with pytest.raises(RankFailureError, match="training ended"):
                ckpt.save(5).wait()
        return [handle.error for handle in handles]

    began = time.monotonic()
    first, second = outcomes(2, run)
    assert isinstance(second, KeyError)
    assert isinstance(first, list)
    assert all(isinstance(error, RankFailureError) for error in first[1:])
    assert time.monotonic() - began < 3 * SOON_S
    never.set()


def test_each_failure_in_flight_is_raised_once_when_asked() -> None:
    root = fresh()
    faults = fail_at("write", "steps/2/*", error=errno.ENOSPC), fail_at("write", "steps/3/*", error=errno.EIO)

    def run(ranks: Ranks) -> list[int]:
        with open_on(ranks, Faulty(root, *faults), {"x": torch.ones(3)}, on_failure="raise", **SEVERAL) as ckpt:
            planned(ckpt)
            for handle in [ckpt.save(2), ckpt.save(3)]:
                handle.join(10)
            with pytest.raises(DscheckError, match="No space left"):
                ckpt.save(4)
            with pytest.raises(DscheckError, match="Input/output"):
                ckpt.save(4)
            ckpt.save(4).wait()
            return ckpt.steps()

    assert job(1, run) == [[1, 4]]


def test_a_failure_in_flight_is_raised_at_a_clean_exit_when_asked() -> None:
    root = fresh()

    def run(ranks: Ranks) -> None:
        storage = Faulty(root, fail_at("write", "steps/2/*", error=errno.ENOSPC))
        with open_on(ranks, storage, {"x": torch.ones(3)}, on_failure="raise", **SEVERAL) as ckpt:
            for step in (1, 2, 3):
                ckpt.save(step)

    assert "No space left" in str(outcomes(1, run)[0])
    assert {entry.key.split("-")[0] for entry in root.list("records/")} == {"records/1", "records/3"}


def test_a_newer_job_fails_all_in_flight() -> None:
    """Invariant C2."""
    root, let_go = fresh(), threading.Event()

    def run(ranks: Ranks) -> None:
        with open_on(ranks, Faulty(root, hang(let_go, "commit", "steps/2/*")), {"x": torch.ones(3)}, **SEVERAL) as old:
            planned(old)
            handles = [old.save(step) for step in (2, 3, 4)]
            job(1, take_over)
            let_go.set()
            for handle in handles:
                with pytest.raises(SupersededError):
                    handle.wait()
            assert isinstance(old.save(5).error, SupersededError)

    def take_over(ranks: Ranks) -> None:
        with open_on(ranks, root, {"x": torch.zeros(3)}) as new:
            new.load()
            new.save(7).wait()

    job(1, run)


def test_a_load_waits_for_all_in_flight() -> None:
    root = fresh()

    def run(ranks: Ranks) -> int | None:
        state = {"x": torch.zeros(3)}
        with open_on(ranks, Faulty(root, slow(0.1, "commit")), state, **SEVERAL) as ckpt:
            planned(ckpt)
            for step in (2, 3, 4):
                ckpt.fence()
                state["x"].fill_(step)
                ckpt.save(step)
            ckpt.fence()
            state["x"].fill_(99)
            step = ckpt.load()
            assert state["x"].tolist() == [4.0] * 3
            return step

    assert job(1, run) == [4]


def test_a_state_that_cannot_be_stored_fails_its_step_alone() -> None:
    root = fresh()

    def run(ranks: Ranks) -> list[int]:
        state = rows(ranks.rank)
        with open_on(ranks, Faulty(root, slow(0.1, "commit")), state, **SEVERAL) as ckpt:
            planned(ckpt)
            before = ckpt.save(2)
            if ranks.rank:
                state["bad"] = object()
                with pytest.raises(StateError, match="bad"):
                    ckpt.save(3)
                del state["bad"]
            else:
                with pytest.raises(RankFailureError, match="rank 1"):
                    ckpt.save(3).wait()
            ckpt.save(4).wait()
            assert before.error is None
            return ckpt.steps()

    assert job(2, run) == [[1, 2, 4]] * 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_died_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant C8."""
    from dscheck.save.pipeline import Pipeline

    root, deaths = fresh(), [2]
    attend = Pipeline.attend

    def dies(self: Pipeline, attempt: Any) -> None:
        if attempt.step in deaths:
            deaths.remove(attempt.step)
            raise SystemExit
        attend(self, attempt)

    monkeypatch.setattr(Pipeline, "attend", dies)

    def run(ranks: Ranks) -> list[int]:
        with open_on(ranks, root, {"x": torch.ones(3)}, **SEVERAL) as ckpt:
            planned(ckpt)
            lost = ckpt.save(2)
            time.sleep(0.3)
            ckpt.save(3).wait()
            assert "died" in str(lost.error)
            return ckpt.steps()

    assert job(1, run) == [[1, 3]]


def test_no_more_saves_are_in_flight_than_their_objects_may_hold_memory_for() -> None:
    root = fresh()

    def run(ranks: Ranks) -> int:
        with open_on(ranks, Faulty(root, slow(0.03, "commit")), {"x": torch.ones(1)}, **SEVERAL) as ckpt:
            return max(ckpt.save(step).stats.in_flight for step in range(1, 25))

    assert 3 <= job(1, run)[0] <= 8


def test_a_save_whose_plan_fails_lets_the_next_one_resend_its_claims() -> None:
    root = fresh()

    def run(ranks: Ranks) -> list[int]:
        storage = root if ranks.rank else Faulty(root, fail_at("put_if_absent", "plans/*", error=errno.EIO))
        with open_on(ranks, storage, rows(ranks.rank), **SEVERAL) as ckpt:
            first, second = ckpt.save(1), ckpt.save(2)
            second.wait()
            assert first.error is not None
            return ckpt.steps()

    assert job(2, run) == [[2]] * 2


def test_one_save_after_another_in_a_root_with_commits() -> None:
    root = fresh()
    save(root, 1, [{"x": torch.ones(3)}])

    def run(ranks: Ranks) -> list[int]:
        with open_on(ranks, root, {"x": torch.zeros(3)}, **SEVERAL) as ckpt:
            assert ckpt.load() == 1
            for step in range(2, 6):
                ckpt.save(step)
        return ckpt.steps()

    assert job(1, run) == [[1, 2, 3, 4, 5]]


def test_a_background_that_got_one_of_its_threads_gets_the_other_later(monkeypatch: pytest.MonkeyPatch) -> None:
    start, refused = threading.Thread.start, []

    def scarce(thread: threading.Thread) -> None:
        if thread.name == "dscheck-save" and not refused:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", scarce)
    before = sum(thread.name == "dscheck-capture" for thread in threading.enumerate())
    with Checkpointer(fresh(), {"x": torch.zeros(5)}) as ckpt:
        with pytest.raises(RuntimeError, match="can't start new thread"):
            ckpt.save(1).wait()
        ckpt.save(2).wait()
        assert sum(thread.name == "dscheck-capture" for thread in threading.enumerate()) == before + 1
    assert ckpt.steps() == [2]


def test_a_background_that_got_no_thread_closes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11 prints what is raised at the end of the process, where it would be closed again."""
    registered: list[Any] = []
    monkeypatch.setattr(atexit, "register", registered.append)
    monkeypatch.setattr(atexit, "unregister", lambda call: registered.clear())

    def none(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    ckpt = Checkpointer(fresh(), {"x": torch.zeros(5)})
    with monkeypatch.context() as scarce:
        scarce.setattr(threading.Thread, "start", none)
        assert isinstance(ckpt.save(1).error, RuntimeError)
    ckpt.close()
    assert not registered


def test_a_skip_for_which_there_is_no_thread_is_told_in_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    root, let_go, start = fresh(), threading.Event(), threading.Thread.start

    def scarce(thread: threading.Thread) -> None:
        if thread.name == "dscheck-skip":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", scarce)
    faulty = Faulty(root, hang(let_go, "write", "steps/2/*"))
    with Checkpointer(faulty, {"x": torch.zeros(1 << 20)}, when_busy="skip") as ckpt:  # too long to be copied aside
        planned(ckpt)
        second, third = ckpt.save(2), ckpt.save(3)
        let_go.set()
        second.wait()
        with pytest.raises(SaveSkippedError):
            third.wait()
        ckpt.save(4).wait()
        assert ckpt.steps() == [1, 2, 4]


@pytest.mark.parametrize(("last", "code", "steps"), [("pass", 0, [1, 2]), ("raise ValueError", 1, [1])])
def test_a_process_that_ends_without_close_ends_its_saves_first(
    last: str, code: int, steps: list[int], tmp_path: Path
) -> None:
    """A thread that returns from native code while the interpreter goes would abort the process."""
    script = f"""
import torch
from dscheck import Checkpointer
from dscheck.storage.local import LocalStorage
from dscheck.testing.faults import Faulty, slow
state = {{"x": torch.randn(8_000_000), "y": [torch.randn(200_000) for _ in range(20)]}}
ckpt = Checkpointer(Faulty(LocalStorage({str(tmp_path)!r}), slow(0.3, "write", "steps/2/*")), state)
ckpt.save(1).wait()
ckpt.save(2)
{last}
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == code, ended.stderr
    with Checkpointer(tmp_path, {}) as ckpt:
        assert ckpt.steps() == steps


def test_a_second_thread_in_save_is_refused_and_breaks_nothing() -> None:
    with Checkpointer(fresh(), {"w": torch.ones(300)}) as ckpt:
        assert ckpt._saving.acquire()  # as the first one holds it
        with pytest.raises(ConfigError, match="another thread"):
            ckpt.save(1)
        ckpt._saving.release()
        ckpt.save(1).wait()
        assert ckpt.steps() == [1]
