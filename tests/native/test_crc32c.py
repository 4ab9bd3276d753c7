"""The native CRC32C, on both of its paths, against a slow Python twin and published vectors."""

from __future__ import annotations

import mmap
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from dscheck import native
from dscheck.native import _core

Crc = Callable[..., int]
PATHS = [pytest.param(_core.crc32c, id="best"), pytest.param(_core.crc32c_scalar, id="scalar")]
BOTH = pytest.mark.parametrize("crc", PATHS)
CHECK = b"123456789"
CHECK_CRC = 0xE3069283

# Long enough for several rounds of three lanes of 256 bytes and each kind of tail.
NOISE = np.random.default_rng(20).integers(0, 256, 10_000, dtype=np.uint8).tobytes()


def _table_entry(byte: int) -> int:
    for _ in range(8):
        byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
    return byte


TABLE = [_table_entry(byte) for byte in range(256)]


def twin(data: bytes, value: int = 0) -> int:
    crc = value ^ 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


@BOTH
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"\x00" * 32, 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(reversed(range(32))), 0x113FDB5C),
        (CHECK, CHECK_CRC),
    ],
)
def test_published_vectors(crc: Crc, data: bytes, expected: int) -> None:
    assert crc(data) == expected == twin(data)


@BOTH
@given(start=st.integers(0, 64), size=st.integers(0, len(NOISE) - 64), value=st.integers(0, 2**32 - 1))
@example(start=1, size=3 * 256, value=0)
@example(start=3, size=6 * 256 + 8 + 7, value=2**32 - 1)
def test_equals_the_twin_at_any_length_and_alignment(crc: Crc, start: int, size: int, value: int) -> None:
    piece = memoryview(NOISE)[start : start + size]
    assert crc(piece, value) == twin(bytes(piece), value)


@BOTH
@given(cuts=st.lists(st.integers(0, len(NOISE)), max_size=6))
def test_continuation_equals_one_call(crc: Crc, cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(NOISE)]
    value = 0
    for start, stop in pairwise(edges):
        value = crc(NOISE[start:stop], value)
    assert value == crc(NOISE)


@BOTH
@given(bit=st.integers(0, 8 * len(NOISE) - 1))
def test_any_single_flipped_bit_changes_the_crc(crc: Crc, bit: int) -> None:
    damaged = bytearray(NOISE)
    damaged[bit // 8] ^= 1 << (bit % 8)
    assert crc(damaged) != crc(NOISE)


@given(size=st.integers(0, len(NOISE)), block_bytes=st.integers(1, 12_000))
@example(size=8192, block_bytes=4096)
@example(size=8193, block_bytes=4096)
def test_blocks_are_the_crcs_of_their_slices(size: int, block_bytes: int) -> None:
    data = NOISE[:size]
    found = native.crc32c_blocks(data, block_bytes)
    expected = [native.crc32c(data[at : at + block_bytes]) for at in range(0, size, block_bytes)]
    assert found.dtype == np.uint32
    assert found.tolist() == expected


def test_no_data_has_no_blocks() -> None:
    assert native.crc32c_blocks(b"", 256).shape == (0,)


def test_a_block_larger_than_any_data_is_one_block() -> None:
    assert native.crc32c_blocks(CHECK, 2**62).tolist() == [CHECK_CRC]


def test_blocks_outlive_the_data() -> None:
    data = bytearray(NOISE)
    found = native.crc32c_blocks(data, 4096)
    expected = found.tolist()
    data.clear()
    assert found.tolist() == expected


def _mapped() -> mmap.mmap:
    with tempfile.TemporaryFile() as file:
        file.write(CHECK)
        file.flush()
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@BOTH
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: CHECK, id="bytes"),
        pytest.param(lambda: bytearray(CHECK), id="bytearray"),
        pytest.param(lambda: memoryview(CHECK), id="read-only memoryview"),
        pytest.param(lambda: memoryview(bytearray(CHECK)), id="memoryview"),
        pytest.param(lambda: memoryview(b"x" + CHECK)[1:], id="offset memoryview"),
        pytest.param(lambda: np.frombuffer(CHECK, np.uint8), id="read-only array"),
        pytest.param(lambda: np.array(list(CHECK), np.uint8), id="array"),
        pytest.param(lambda: torch.tensor(list(CHECK), dtype=torch.uint8), id="tensor"),
        pytest.param(_mapped, id="mmap"),
    ],
)
def test_any_contiguous_byte_buffer_is_read_in_place(crc: Crc, make: Callable[[], object]) -> None:
    assert crc(make()) == CHECK_CRC


def test_a_crc_from_an_array_continues() -> None:
    first = native.crc32c_blocks(CHECK[:4], 4)[0]
    assert native.crc32c(CHECK[4:], first) == CHECK_CRC


@pytest.mark.parametrize("call", [*PATHS, pytest.param(partial(_core.crc32c_blocks, block_bytes=4), id="blocks")])
@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ("text", TypeError, "got a str"),
        (None, TypeError, "got a NoneType"),
        ([1, 2], TypeError, "got a list"),
        (np.zeros(3, np.float32), TypeError, "expected elements of type uint8"),
        (np.zeros(3, np.int8), TypeError, "expected elements of type uint8"),
        (torch.zeros(3, dtype=torch.bfloat16), TypeError, "got a torch.Tensor of another type: view it as uint8"),
        (np.zeros((3, 3), np.uint8), ValueError, "expected 1 dimension, got a .*ndarray with 2"),
        (torch.zeros((), dtype=torch.uint8), ValueError, "expected 1 dimension, got a torch.Tensor with 0"),
        (np.zeros(9, np.uint8)[::2], ValueError, "stride of 2"),
        (np.zeros(9, np.uint8)[::-1], ValueError, "stride of -1"),
        (torch.zeros(9, dtype=torch.uint8)[::2], ValueError, "stride of 2"),
    ],
)
def test_anything_else_is_refused_by_name(call: Crc, data: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(data)


@BOTH
@pytest.mark.parametrize("value", [-1, 2**32])
def test_a_value_that_is_no_crc_is_refused(crc: Crc, value: int) -> None:
    with pytest.raises(ValueError, match=rf"expected a CRC in \[0, 2\*\*32\), got {value}"):
        crc(CHECK, value)


@pytest.mark.parametrize("block_bytes", [0, -1])
def test_blocks_of_no_bytes_are_refused(block_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"block_bytes: expected at least 1, got {block_bytes}"):
        native.crc32c_blocks(CHECK, block_bytes)


def test_other_threads_run_meanwhile() -> None:
    data = np.zeros(1 << 28, np.uint8)
    ticks = 0
    done = threading.Event()

    def checksum() -> None:
        _core.crc32c_scalar(data)
        done.set()

    worker = threading.Thread(target=checksum)
    worker.start()
    while not done.is_set():
        ticks += 1
    worker.join()
    # A call that kept the GIL would let this loop run for a switch interval or two at either end of it.
    assert ticks > 10_000
