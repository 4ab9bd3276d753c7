"""An object in parts: its bytes, when lent memory is given back, and what an error or a slow part does."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pytest

from dscheck.errors import StorageError
from dscheck.save.parts import JOINED_BYTES, InParts
from dscheck.save.trace import Trace

MIB = 1 << 20
PART = 4 * MIB
NOISE = np.random.default_rng(11).integers(0, 256, 30 * MIB + 77, dtype=np.uint8)


class Parts:
    """A PartWriter that keeps its parts; `gate` holds them up, `bad` is refused."""

    parts_in_flight = 3

    def __init__(self, bad: int | None = None) -> None:
        self.parts: dict[int, bytes] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.bad = bad
        self.most = self.now = 0
        self.lock = threading.Lock()

    def part_bytes(self, nbytes: int) -> int:
        return PART

    def put_part(self, number: int, buffers: Sequence[memoryview]) -> None:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        assert self.gate.wait(30)
        with self.lock:
            self.now -= 1
        if number == self.bad:
            raise StorageError("refused")
        self.parts[number] = b"".join(buffers)

    def write(self, data: object) -> None:
        raise NotImplementedError

    commit = abort = write


class Lent:
    """Memory that is overwritten when it is given back, as the capture's is."""

    def __init__(self, data: bytes) -> None:
        self.memory, self.times = bytearray(data), 0

    def free(self) -> None:
        self.times += 1
        self.memory[:] = bytes(len(self.memory))


def in_parts(writer: Parts, *, may_hold: bool = True) -> InParts:
    return InParts(writer, len(NOISE), Trace(None, 1, 0), lambda: None, lambda: may_hold)  # type: ignore[arg-type]


def lend(out: InParts, sizes: Sequence[int]) -> list[Lent]:
    """NOISE in pieces of these sizes, again and again."""
    lent, start = [], 0
    while start < len(NOISE):
        size = sizes[len(lent) % len(sizes)]
        lent.append(Lent(NOISE[start : start + size].tobytes()))
        out.write(memoryview(lent[-1].memory), lent[-1].free)
        start += size
    return lent


@pytest.mark.parametrize("may_hold", [True, False])
@pytest.mark.parametrize("sizes", [[PART], [7 * MIB + 5], [5, JOINED_BYTES - 1, JOINED_BYTES, 100], [3 * MIB, 1]])
def test_all_bytes_arrive_in_equal_parts_and_all_memory_is_given_back_once(sizes: list[int], may_hold: bool) -> None:
    writer = Parts()
    out = in_parts(writer, may_hold=may_hold)
    lent = lend(out, sizes)
    out.flush()
    assert out.offset == len(NOISE)
    assert b"".join(writer.parts[number] for number in sorted(writer.parts)) == NOISE.tobytes()
    assert [len(writer.parts[number]) for number in range(len(writer.parts) - 1)] == [PART] * (len(writer.parts) - 1)
    assert [one.times for one in lent] == [1] * len(lent)


def test_what_is_not_lent_may_change_at_once() -> None:
    writer = Parts()
    out = in_parts(writer)
    memory = bytearray(3 * MIB)
    for value in (1, 2, 3):
        memory[:] = bytes([value]) * len(memory)
        out.write(memory)
    out.pad_to(10 * MIB)
    out.flush()
    expected = b"".join(bytes([value]) * len(memory) for value in (1, 2, 3)) + bytes(MIB)
    assert writer.parts[0] + writer.parts[1] + writer.parts[2] == expected


def test_memory_that_fills_no_part_is_kept_only_where_it_may_be() -> None:
    for may_hold in (True, False):
        out, lent = in_parts(Parts(), may_hold=may_hold), Lent(bytes(2 * MIB))
        out.write(memoryview(lent.memory), lent.free)
        assert lent.times == (0 if may_hold else 1)
        out.flush()
        assert lent.times == 1


def test_no_more_parts_are_under_way_than_the_storage_wants() -> None:
    writer = Parts()
    writer.gate.clear()
    out = in_parts(writer)
    threading.Timer(0.3, writer.gate.set).start()
    lend(out, [PART])
    out.flush()
    assert writer.most == writer.parts_in_flight


def test_an_error_of_a_part_shows_and_gives_the_memory_back() -> None:
    out = in_parts(Parts(bad=1))
    lent = [Lent(bytes(PART)) for _ in range(3)]

    def write_all() -> None:
        for one in lent:
            out.write(memoryview(one.memory), one.free)
        out.flush()

    with pytest.raises(StorageError, match="refused"):
        write_all()
    assert lent[1].times == 1


def test_a_wait_for_slow_parts_ends_when_it_is_told_to_stop() -> None:
    writer = Parts()
    writer.gate.clear()

    def stop() -> None:
        raise TimeoutError("deadline")

    out = InParts(writer, len(NOISE), Trace(None, 1, 0), stop, lambda: True)  # type: ignore[arg-type]
    with pytest.raises(TimeoutError, match="deadline"):
        lend(out, [PART])
    writer.gate.set()
