"""What an exchange promises, whatever carries it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from dscheck.errors import (
    ConfigError,
    DeadlineError,
    DscheckError,
    IncompleteCoverError,
    RankFailureError,
    StorageError,
)
from dscheck.layout.region import Region
from dscheck.ranks.base import Failed, Ok, Ranks
from dscheck.ranks.board import BoardLostError
from dscheck.testing.ranks import run_ranks

MakeRanks = Callable[[int], list[Ranks]]


def join(payloads: Sequence[bytes]) -> bytes:
    return b",".join(payloads)


def must_not_decide(payloads: Sequence[bytes]) -> bytes:
    raise AssertionError("decide ran")


def ask(
    ranks: Ranks,
    mine: Ok | Failed | None = None,
    decide: Callable[[Sequence[bytes]], bytes] = join,
    round: str = "save-1/plan",
    timeout_s: float = 10.0,
) -> bytes:
    mine = Ok(str(ranks.rank).encode()) if mine is None else mine
    return ranks.exchange(round, mine, decide, deadline=time.monotonic() + timeout_s, phase="plan of step 300")


def left_on_board(ranks: Ranks) -> set[str]:
    board: Any = ranks._board  # type: ignore[attr-defined]
    if hasattr(board, "keys"):
        return set(board.keys)
    count: int = board._server.num_keys()
    return {f"{count} keys"} - {"1 keys"}  # the token


def test_every_rank_gets_what_rank_0_decided_on_payloads_in_rank_order(make_ranks: MakeRanks) -> None:
    assert run_ranks(5, ask, ranks=make_ranks(5)) == [b"0,1,2,3,4"] * 5


def test_a_single_rank_agrees_with_itself(make_ranks: MakeRanks) -> None:
    assert run_ranks(1, ask, ranks=make_ranks(1)) == [b"0"]


def test_only_rank_0_decides_and_once(make_ranks: MakeRanks) -> None:
    calls: list[int] = []

    def fn(ranks: Ranks) -> bytes:
        def decide(payloads: Sequence[bytes]) -> bytes:
            calls.append(ranks.rank)
            return b""

        return ask(ranks, decide=decide)

    assert run_ranks(3, fn, ranks=make_ranks(3)) == [b""] * 3
    assert calls == [0]


@pytest.mark.parametrize(("failed", "absent"), [(0, 1), (0, 3), (2, 0), (2, 1), (2, 3)])
def test_a_failed_rank_fails_all_at_once_without_waiting_for_absent_ones(
    make_ranks: MakeRanks, failed: int, absent: int
) -> None:
    def fn(ranks: Ranks) -> bytes | None:
        if ranks.rank == absent:
            return None
        mine = Failed("StorageError: disk full") if ranks.rank == failed else None
        return ask(ranks, mine, must_not_decide)

    started = time.monotonic()
    outcomes = run_ranks(4, fn, ranks=make_ranks(4))
    assert time.monotonic() - started < 2
    for rank, error in enumerate(outcomes):
        if rank != absent:
            assert isinstance(error, RankFailureError)
            assert error.fields == {
                "ranks": (failed,),
                "phase": "plan of step 300",
                "round": "save-1/plan",
                "messages": ("StorageError: disk full",),
            }
            assert str(error) == f"plan of step 300: rank {failed} failed: StorageError: disk full"


def test_two_failures_give_one_outcome(make_ranks: MakeRanks) -> None:
    outcomes = run_ranks(3, lambda ranks: ask(ranks, Failed(f"of {ranks.rank}")), ranks=make_ranks(3))
    assert all(isinstance(error, RankFailureError) for error in outcomes)
    assert len({str(error) for error in outcomes}) == 1


@pytest.mark.parametrize("absent", [{2}, {1, 3}, {0}, {0, 1, 2}])
def test_an_expired_wait_lists_every_absent_rank_on_all_others(make_ranks: MakeRanks, absent: set[int]) -> None:
    started = time.monotonic()
    outcomes = run_ranks(
        4,
        lambda ranks: None if ranks.rank in absent else ask(ranks, decide=must_not_decide, timeout_s=0.3),
        ranks=make_ranks(4),
    )
    assert 0.25 < time.monotonic() - started < 1.5
    for rank in set(range(4)) - absent:
        error = outcomes[rank]
        assert isinstance(error, DeadlineError)
        assert error.fields["ranks"] == tuple(sorted(absent))
        assert error.fields["phase"] == "plan of step 300"
        assert ", ".join(map(str, sorted(absent))) in error.fields["waited_for"]
        assert "save-1/plan" in str(error)


def test_the_earliest_deadline_ends_the_round_for_all(make_ranks: MakeRanks) -> None:
    started = time.monotonic()
    outcomes = run_ranks(
        3,
        lambda ranks: None if ranks.rank == 2 else ask(ranks, timeout_s=0.3 if ranks.rank == 1 else 20),
        ranks=make_ranks(3),
    )
    assert time.monotonic() - started < 2
    assert [type(error) for error in outcomes[:2]] == [DeadlineError, DeadlineError]
    assert str(outcomes[0]) == str(outcomes[1])


def test_a_decision_that_outlasts_a_deadline_is_the_same_error_everywhere(make_ranks: MakeRanks) -> None:
    def slow(payloads: Sequence[bytes]) -> bytes:
        time.sleep(0.6)
        return b"decided"

    outcomes = run_ranks(3, lambda ranks: ask(ranks, decide=slow, timeout_s=0.3), ranks=make_ranks(3))
    for error in outcomes:
        assert isinstance(error, DeadlineError)
        assert error.fields["ranks"] == (0,)
        assert "the answer of rank 0, with all 3 ranks there" in error.fields["waited_for"]


@pytest.mark.parametrize("mine", [Ok(), Failed("gave up")])
def test_a_late_rank_reads_the_answer_at_once(make_ranks: MakeRanks, mine: Ok | Failed) -> None:
    members = make_ranks(3)
    early = run_ranks(3, lambda r: None if r.rank == 2 else ask(r, timeout_s=0.2), ranks=members)
    started = time.monotonic()
    with pytest.raises(DeadlineError) as late:
        ask(members[2], mine, timeout_s=10)
    assert time.monotonic() - started < 1
    assert str(late.value) == str(early[0])
    assert left_on_board(members[0]) == set()


def test_a_deadline_that_has_passed_is_not_waited_for(make_ranks: MakeRanks) -> None:
    members = make_ranks(2)
    started = time.monotonic()
    with pytest.raises(DeadlineError):
        ask(members[1], timeout_s=-1.0)
    assert time.monotonic() - started < 1


def test_a_late_rank_0_does_not_decide_a_round_that_is_over(make_ranks: MakeRanks) -> None:
    members = make_ranks(3)
    run_ranks(3, lambda r: None if r.rank == 0 else ask(r, timeout_s=0.2), ranks=members)
    with pytest.raises(DeadlineError) as late:
        ask(members[0], decide=must_not_decide)
    assert late.value.fields["ranks"] == (0,)


def test_an_error_of_decide_is_the_same_on_all_ranks(make_ranks: MakeRanks) -> None:
    fields = {"tensor": "w", "missing": Region((0, 4), (8, 8)), "at": (1, (2, [3.5])), "more": {"a": None, "b": True}}

    def decide(payloads: Sequence[bytes]) -> bytes:
        raise IncompleteCoverError("tensor 'w': [0:8, 4:8] is missing", **fields)

    for error in run_ranks(3, lambda ranks: ask(ranks, decide=decide), ranks=make_ranks(3)):
        assert type(error) is IncompleteCoverError
        assert str(error) == "tensor 'w': [0:8, 4:8] is missing"
        assert error.fields == fields
        assert error.missing == Region((0, 4), (8, 8))  # type: ignore[attr-defined]


def test_an_error_class_of_somebody_else_becomes_a_dscheck_error(make_ranks: MakeRanks) -> None:
    class OwnError(DscheckError):
        pass

    def decide(payloads: Sequence[bytes]) -> bytes:
        raise OwnError("mine", what=object)

    outcomes = run_ranks(2, lambda ranks: ask(ranks, decide=decide), ranks=make_ranks(2))
    assert type(outcomes[0]) is OwnError
    assert type(outcomes[1]) is DscheckError
    assert str(outcomes[1]) == "mine"
    assert outcomes[1].fields == {"what": repr(object)}


def test_any_other_exception_of_decide_is_rank_0s_failure(make_ranks: MakeRanks) -> None:
    raised = ZeroDivisionError("division by zero")

    def decide(payloads: Sequence[bytes]) -> bytes:
        raise raised

    outcomes = run_ranks(3, lambda ranks: ask(ranks, decide=decide), ranks=make_ranks(3))
    assert outcomes[0] is raised
    for error in outcomes[1:]:
        assert isinstance(error, RankFailureError)
        assert error.fields["ranks"] == (0,)
        assert error.fields["messages"] == ("ZeroDivisionError: division by zero",)


def test_rank_0_closing_fails_those_who_wait_naming_it(make_ranks: MakeRanks) -> None:
    members = make_ranks(3)

    def fn(ranks: Ranks) -> bytes | None:
        if ranks.rank == 0:
            time.sleep(0.2)
            ranks.close()
            return None
        return ask(ranks)

    started = time.monotonic()
    outcomes = run_ranks(3, fn, ranks=members)
    assert time.monotonic() - started < 5
    for error in outcomes[1:]:
        assert isinstance(error, RankFailureError)
        assert error.fields["ranks"] == (0,)
        assert "rank 0 cannot be reached" in str(error)


def test_rounds_run_at_once_from_several_threads(make_ranks: MakeRanks) -> None:
    members = make_ranks(3)

    def fn(ranks: Ranks) -> dict[str, bytes]:
        answers: dict[str, bytes] = {}

        def one(name: str) -> None:
            answers[name] = ask(ranks, Ok(f"{name}.{ranks.rank}".encode()), round=name)

        # Each rank starts them in another order: none may block another.
        names = [f"r{(i + ranks.rank) % 4}" for i in range(4)]
        threads = [threading.Thread(target=one, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
            time.sleep(0.02)
        for thread in threads:
            thread.join(10)
        return answers

    want = {f"r{i}": f"r{i}.0,r{i}.1,r{i}.2".encode() for i in range(4)}
    assert run_ranks(3, fn, ranks=members) == [want] * 3
    assert left_on_board(members[0]) == set()


def test_a_waiting_thread_does_not_delay_another_round(make_ranks: MakeRanks) -> None:
    """TRAPS 24."""
    members = make_ranks(2)
    waiting = threading.Thread(target=lambda: run_ranks(1, lambda r: ask(members[1], round="never", timeout_s=1.5)))
    waiting.start()
    time.sleep(0.1)
    started = time.monotonic()
    assert run_ranks(2, ask, ranks=members) == [b"0,1"] * 2
    assert time.monotonic() - started < 0.5
    waiting.join()


def test_payloads_and_answers_of_many_megabytes(make_ranks: MakeRanks) -> None:
    """TRAPS 25."""
    members = make_ranks(3)
    size = (20 << 20) + 1

    def decide(payloads: Sequence[bytes]) -> bytes:
        assert [len(payload) for payload in payloads] == [size] * 3
        return payloads[2][1:] + payloads[1][:1]

    outcomes = run_ranks(3, lambda r: ask(r, Ok(bytes([r.rank]) * size), decide), ranks=members)
    assert outcomes == [b"\x02" * (size - 1) + b"\x01"] * 3
    assert left_on_board(members[0]) == set()


@pytest.mark.parametrize("size", [0, 1, (64 << 10) - 1, 64 << 10, (64 << 10) + 1, 1 << 20, (1 << 20) + 1, 2 << 20])
def test_bytes_of_any_size_and_value_arrive_as_they_are(make_ranks: MakeRanks, size: int) -> None:
    payload = bytes(range(256)) * (size // 256) + bytes(range(size % 256))
    outcomes = run_ranks(2, lambda r: ask(r, Ok(payload), lambda payloads: payloads[1]), ranks=make_ranks(2))
    assert outcomes == [payload, payload]


def test_nothing_stays_on_the_board(make_ranks: MakeRanks) -> None:
    members = make_ranks(3)

    def fn(ranks: Ranks) -> None:
        ask(ranks, round="good")
        for name, failed in [("one", {1}), ("all", {0, 1, 2})]:
            mine = Failed("x" * 70_000) if ranks.rank in failed else Ok(bytes(70_000))
            with pytest.raises(RankFailureError):
                ask(ranks, mine, round=name)

    assert run_ranks(3, fn, ranks=members) == [None] * 3
    assert left_on_board(members[0]) == set()


def test_a_round_that_a_dead_rank_never_read_shrinks_to_an_error(make_ranks: MakeRanks) -> None:
    members = make_ranks(3)

    def fail(round: int, rank: int) -> None:
        with pytest.raises(RankFailureError):
            ask(members[rank], Failed("x" * 100_000), round=f"save-{round}/plan")

    for number in range(18):
        fail(number, 0)
        fail(number, 1)
    with pytest.raises(RankFailureError, match="x" * 1000):
        ask(members[2], round="save-17/plan")
    started = time.monotonic()
    with pytest.raises(RankFailureError, match=r"'save-0/plan' ended more than 16 rounds ago"):
        ask(members[2], round="save-0/plan")
    assert time.monotonic() - started < 1


def test_closing_keeps_the_board_until_the_others_have_read(make_ranks: MakeRanks) -> None:
    members = make_ranks(2)
    members[0]._linger_s = 5.0  # type: ignore[attr-defined]
    with pytest.raises(RankFailureError):
        ask(members[0], Failed("no disk"))
    closing = threading.Thread(target=members[0].close)
    closing.start()
    time.sleep(0.2)
    with pytest.raises(RankFailureError, match="rank 0 failed: no disk"):
        ask(members[1])
    closing.join(1)
    assert not closing.is_alive()


def test_a_board_that_breaks_after_the_answer_takes_nothing_from_it(
    make_ranks: MakeRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = make_ranks(2)

    def lost(keys: Sequence[str], until: float) -> None:
        raise BoardLostError("gone")

    monkeypatch.setattr(members[1]._board, "delete", lost)  # type: ignore[attr-defined]
    assert run_ranks(2, ask, ranks=members) == [b"0,1"] * 2


@pytest.mark.parametrize("closing", [0, 1])
def test_a_rank_that_closes_in_mid_round_fails_it_for_all(make_ranks: MakeRanks, closing: int) -> None:
    members = make_ranks(3)
    members[closing]._linger_s = 0.5  # type: ignore[attr-defined]

    def fn(ranks: Ranks) -> bytes | None:
        if ranks.rank == 2:
            time.sleep(0.3)
            members[closing].close()
            return None
        return ask(ranks)

    started = time.monotonic()
    outcomes = run_ranks(3, fn, ranks=members)
    assert time.monotonic() - started < 4
    for error in outcomes[:2]:
        assert isinstance(error, RankFailureError)
        assert error.fields["ranks"] == (closing,)
        assert "closed before the round had ended" in str(error)


def test_closed_ranks_refuse_and_closing_twice_is_fine(make_ranks: MakeRanks) -> None:
    members = make_ranks(2)
    members[1].close()
    members[1].close()
    with pytest.raises(ConfigError, match="closed"):
        ask(members[1])


def test_a_storage_error_keeps_its_builtin_type_on_the_wire(make_ranks: MakeRanks) -> None:
    def decide(payloads: Sequence[bytes]) -> bytes:
        raise StorageError("no space", url="file:///data", key="records/3-1.json")

    for error in run_ranks(2, lambda ranks: ask(ranks, decide=decide), ranks=make_ranks(2)):
        assert isinstance(error, OSError)
        assert isinstance(error, StorageError)
        assert error.fields == {"url": "file:///data", "key": "records/3-1.json"}
