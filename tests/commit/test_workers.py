"""Work side by side: who fails ends the others, and nobody waits for one that hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from dscheck.commit import workers
from dscheck.commit.workers import Stop, ahead, side_by_side


def test_a_job_that_fails_ends_those_beside_it_before_the_caller_goes_on() -> None:
    ended = threading.Event()

    def long(stop: Stop) -> None:
        try:
            while True:
                stop()
                time.sleep(0.001)
        finally:
            ended.set()

    def fails(stop: Stop) -> None:
        raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        side_by_side([long, fails], 2, lambda: None, "test")
    assert ended.is_set()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("test-")]


def test_one_that_hangs_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "LEAVE_S", 0.1)
    never, began = threading.Event(), time.monotonic()

    def hangs(stop: Stop) -> None:
        never.wait(60)

    def late() -> None:
        if time.monotonic() > began + 0.3:
            raise TimeoutError("too late")

    with pytest.raises(TimeoutError, match="too late"):
        side_by_side([hangs], 1, late, "test")
    assert time.monotonic() - began < 10
    never.set()


def test_items_are_made_ahead_and_their_maker_ends_with_who_takes_them() -> None:
    made = []

    def items() -> Iterator[int]:
        for number in range(1000):
            made.append(number)
            yield number

    taken = []
    for item in ahead(items(), "test"):
        taken.append(item)
        if item == 3:
            break
    assert taken == [0, 1, 2, 3]
    deadline = time.monotonic() + 10
    while [thread for thread in threading.enumerate() if thread.name == "test"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(made) < 10
