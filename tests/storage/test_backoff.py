"""When something is tried again, how long, and what ends it."""

from __future__ import annotations

import threading
import time

import pytest

from dscheck.errors import StorageError, TransientStorageError
from dscheck.storage.backoff import Backoff

QUICK = Backoff(patience_s=0.3, first_s=0.001, longest_s=0.02)


class Failing:
    def __init__(self, times: int, error: type[StorageError] = TransientStorageError) -> None:
        self.times, self.error, self.calls = times, error, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error("busy", url="s3://b", key="k")
        return "done"


def test_what_succeeds_later_is_returned() -> None:
    call = Failing(3)
    assert QUICK.run(call) == "done"
    assert call.calls == 4


def test_another_error_is_raised_at_once_as_it_is() -> None:
    call = Failing(3, StorageError)
    with pytest.raises(StorageError, match=r"^busy$"):
        QUICK.run(call)
    assert call.calls == 1


def test_patience_ends_and_the_error_says_how_often_and_where() -> None:
    call, began = Failing(1 << 30), time.monotonic()
    with pytest.raises(TransientStorageError, match=r"^busy \(tried \d+ times in 0\.\d s\)$") as caught:
        QUICK.run(call)
    assert time.monotonic() - began < 5
    assert call.calls > 5
    assert caught.value.fields == {"url": "s3://b", "key": "k"}


def test_pauses_differ_and_stay_below_the_longest() -> None:
    moments: list[float] = []

    def call() -> None:
        moments.append(time.monotonic())
        raise TransientStorageError("busy")

    with pytest.raises(TransientStorageError):
        Backoff(patience_s=1.0, first_s=0.05, longest_s=0.1).run(call)
    assert len(moments) > 8  # all of the longest pauses would give 10, none of them thousands
    assert len(moments) < 200


def test_whoever_gives_up_is_not_kept_waiting() -> None:
    stop, began = threading.Event(), time.monotonic()
    threading.Timer(0.2, stop.set).start()
    with pytest.raises(TransientStorageError):
        Backoff(patience_s=60, first_s=30, longest_s=30).run(Failing(1 << 30), stop)
    assert time.monotonic() - began < 20
