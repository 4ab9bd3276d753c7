"""What the board in a TCPStore promises beyond the exchange over it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from dscheck.ranks import store
from dscheck.ranks.board import BoardLostError, BoardTimeoutError
from dscheck.ranks.store import StoreBoard, host_store


@pytest.fixture
def host() -> Iterator[StoreBoard]:
    server = host_store(0, "ours")
    board = StoreBoard(["localhost"], server.port, "ours", server)
    del server
    yield board
    board.close()


def soon() -> float:
    return time.monotonic() + 5


def test_a_put_to_a_dead_store_does_not_pass_for_done(host: StoreBoard) -> None:
    """TRAPS 25."""
    board = StoreBoard(["localhost"], host._port, "ours")
    board.put("key", b"value", soon())
    host.close()
    # torch's `set` returns once more without an error.
    with pytest.raises(BoardLostError):
        board.put("key", b"value", soon())


def test_a_call_that_hangs_is_given_up_and_blocks_no_other(host: StoreBoard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_GRACE_S", 0.1)
    host.put("key", b"value", soon())
    hung = threading.Event()
    started = time.monotonic()
    with pytest.raises(BoardTimeoutError):
        host._call(lambda connection: hung.wait(10), time.monotonic() + 0.1)
    assert host.look("key", soon()) == b"value"
    assert time.monotonic() - started < 3
    hung.set()


def test_the_first_value_of_a_key_stands(host: StoreBoard) -> None:
    long = [bytes([rank]) * 100_000 for rank in range(2)]
    assert host.put_once("key", long[0], soon()) == long[0]
    assert host.put_once("key", long[1], soon()) == long[0]
    assert host.put_once("key", b"", soon()) == long[0]
    assert host.look("key", soon()) == long[0]


def test_a_key_is_deleted_with_its_chunks_and_leaves_the_others(host: StoreBoard) -> None:
    host.put("a", bytes(3_000_000), soon())
    host.put("b", b"", soon())
    host.add("c", soon())
    host.delete(["a", "c", "never"], soon())
    assert host.absent(["a", "b", "c", "never"], soon()) == ["a", "c", "never"]
    assert host._server is not None
    assert host._server.num_keys() == 2  # b and the token


@pytest.mark.parametrize("absent", [[], [0], [6], [1, 2, 5], list(range(7))])
def test_the_absent_keys_are_named_in_order(host: StoreBoard, absent: list[int]) -> None:
    for number in set(range(7)) - set(absent):
        host.put(f"k{number}", b"", soon())
    assert host.absent([f"k{number}" for number in range(7)], soon()) == [f"k{number}" for number in absent]


def test_reading_tells_whether_all_are_there(host: StoreBoard) -> None:
    keys = [f"k{number}" for number in range(150)]
    for number, key in enumerate(keys):
        host.put(key, str(number).encode(), soon())
    assert host.read(keys, soon()) == [str(number).encode() for number in range(150)]
    assert host.read([*keys, "never"], soon()) is None


def test_another_jobs_store_is_not_taken_for_ours(host: StoreBoard) -> None:
    with pytest.raises(BoardLostError, match="another job's store listens there"):
        StoreBoard(["localhost"], host._port, "theirs").put("key", b"", soon())


def test_the_first_host_that_leads_to_the_store_is_taken(host: StoreBoard) -> None:
    board = StoreBoard(["no-such-host.invalid", "localhost"], host._port, "ours")
    board.put("key", b"value", soon())
    assert host.look("key", soon()) == b"value"
    board.close()


def test_a_store_that_cannot_listen_says_so(host: StoreBoard) -> None:
    with pytest.raises(RuntimeError):
        host_store(host._port, "second")
