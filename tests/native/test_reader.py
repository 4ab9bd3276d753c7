"""The native reader: what a file holds arrives, verified, whatever the alignment and whatever the file system says."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dscheck.native import File, NativeReader, crc32c_blocks

BLOCK = 4096
SIZE = 3 * (1 << 20) + 1234


def later(seconds: float = 20.0) -> float:
    return time.monotonic() + seconds


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    data = np.random.default_rng(1).bytes(SIZE)
    path = tmp_path_factory.mktemp("reader") / "data.bin"
    path.write_bytes(data)
    return path, data


def opened(path: Path) -> File:
    fd = os.open(path, os.O_RDONLY)
    try:
        return File(fd)
    finally:
        os.close(fd)


def copy_to(target: NDArray[np.uint8]) -> list[tuple[int, int, int, list[tuple[int, int, int]]]]:
    return [(0, target.ctypes.data, 1, [(len(target), 1, 1)])]


@settings(max_examples=50)
@given(ranges=st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 300_000)), min_size=1, max_size=12))
def test_any_range_arrives_byte_for_byte(stored: tuple[Path, bytes], ranges: list[tuple[int, int]]) -> None:
    path, data = stored
    reader = NativeReader(3, 2, 300_000, BLOCK, -1)
    file = opened(path)
    targets = []
    for start, length in ranges:
        stop = min(start + length, SIZE)
        target = np.zeros(stop - start, np.uint8)
        crcs = crc32c_blocks(data[start:stop], BLOCK)
        reader.add(file, start, stop - start, [(0, stop - start, crcs)], copy_to(target), False)
        targets.append((target, data[start:stop]))
    assert sorted(reader.finished(later()) for _ in ranges) == list(range(len(ranges)))  # type: ignore[type-var]
    for target, expected in targets:
        assert target.tobytes() == expected


def test_a_file_system_without_direct_reads_is_read_through_the_page_cache() -> None:
    """As /proc is."""
    with open("/proc/self/maps", "rb") as shown:
        expected = shown.read(64)
        file = File(shown.fileno())
    reader = NativeReader(1, 1, 64, BLOCK, -1)
    target = np.zeros(64, np.uint8)
    reader.add(file, 0, 64, [], copy_to(target), False)
    assert reader.finished(later()) == 0
    assert target.tobytes() == expected


def test_a_file_that_ends_early_is_a_fault_with_its_end(stored: tuple[Path, bytes]) -> None:
    reader = NativeReader(1, 1, 10_000, BLOCK, -1)
    reader.add(opened(stored[0]), SIZE - 5000, 10_000, [], [], False)
    assert reader.finished(later()) is None
    assert reader.fault() == (0, SIZE, 0, None)


def test_a_damaged_block_is_named_and_stops_the_rest(stored: tuple[Path, bytes]) -> None:
    path, data = stored
    start, length = 8192, 5 * BLOCK
    crcs = crc32c_blocks(data[start : start + length], BLOCK)
    wrong = crcs.copy()
    wrong[3] ^= 1
    target = np.zeros(length, np.uint8)
    reader = NativeReader(1, 1, length, BLOCK, -1)
    reader.add(opened(path), start, length, [(0, length, wrong)], copy_to(target), False)
    reader.add(opened(path), start, length, [(0, length, crcs)], copy_to(target), False)
    assert reader.finished(later()) is None
    assert reader.fault() == (0, start + 3 * BLOCK, 0, (wrong[3], crcs[3]))
    assert reader.finished(later()) is None
    assert not target.any()


def test_kept_reads_hold_their_buffers_and_only_those(stored: tuple[Path, bytes]) -> None:
    path, data = stored
    reader = NativeReader(4, 2, 1000, BLOCK, -1)
    for number in range(5):
        reader.add(opened(path), number * 1000, 1000, [], [], True)
    done = sorted(reader.finished(later()) for _ in range(2))  # type: ignore[type-var]
    assert done == [0, 1], "what comes first has its buffer first"
    assert reader.finished(later(0.1)) is None
    assert reader.fault() is None
    for number in done:
        assert reader.buffer(number).tobytes() == data[number * 1000 : number * 1000 + 1000]
        reader.release(number)
    assert sorted(reader.finished(later()) for _ in range(2)) == [2, 3]  # type: ignore[type-var]


def test_a_caller_fills_what_has_no_file() -> None:
    data = np.random.default_rng(2).bytes(1000)
    target = np.zeros(1000, np.uint8)
    reader = NativeReader(0, 1, 1000, BLOCK, -1)
    reader.add(None, 0, 1000, [(0, 1000, crc32c_blocks(data, BLOCK))], copy_to(target), False)
    assert reader.next_to_fill(later()) == 0
    reader.buffer(0)[:] = np.frombuffer(data, np.uint8)
    reader.filled(0)
    assert reader.finished(later()) == 0
    assert target.tobytes() == data


def test_nothing_is_placed_after_stop() -> None:
    target = np.zeros(1000, np.uint8)
    reader = NativeReader(0, 1, 1000, BLOCK, -1)
    reader.add(None, 0, 1000, [], copy_to(target), False)
    assert reader.next_to_fill(later()) == 0
    reader.buffer(0)[:] = 7
    reader.stop()
    reader.filled(0)
    assert not target.any()
    assert reader.finished(later()) is None
    assert reader.next_to_fill(later()) is None


def test_a_call_that_fails_is_a_fault_with_its_errno() -> None:
    """A pipe has no positions to read at."""
    reader_end, writer_end = os.pipe()
    try:
        reader = NativeReader(1, 1, 10, BLOCK, -1)
        reader.add(File(reader_end), 0, 10, [], [], False)
        assert reader.finished(later()) is None
        assert reader.fault() == (0, 0, errno.ESPIPE, None)
    finally:
        os.close(reader_end)
        os.close(writer_end)


def test_a_read_longer_than_a_buffer_is_refused(stored: tuple[Path, bytes]) -> None:
    reader = NativeReader(1, 1, 1000, BLOCK, -1)
    with pytest.raises(ValueError, match="longer than a buffer"):
        reader.add(opened(stored[0]), 0, 1001, [], [], False)
