"""Objects from strangers: refused, or read as other valid ones; never a crash, a hang, or memory out of proportion."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dscheck.errors import CorruptCheckpointError
from dscheck.manifest.arrow import decode_files, encode_files
from dscheck.manifest.objects import decode_object, decode_objects
from tests.manifest.stored import BATCH, HEAD, decoded_batch, decoded_head
from tests.manifest.test_arrow import END, file_rows, rewrite, walk_bounds

MAX_GROWTH = 48
"""Python's smallest list, "[]," in three bytes of JSON, takes 64, and as many once more when it is decoded."""

ATTACKS = {"head": 1500, "batch": 1500, "files": 800, "record": 500, "tombstone": 200, "term": 300, "objects": 500}


def test_damaged_objects_never_crash_hang_or_allocate() -> None:
    """TRAPS 36."""
    attacks = [f"{kind}={count}" for kind, count in ATTACKS.items()]
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.manifest.attack", "20261124", *attacks]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=root, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["kind"] for row in found] == list(ATTACKS)
    for row in found:
        assert row["refused"] > row["count"] / 3, row
        assert row["slowest_s"] < 1, row


def patched(data: bytes, old: bytes, new: bytes) -> list[bytes]:
    """`data` with one aligned occurrence of `old` replaced, in every way there is."""
    places = [at for at in range(0, len(data) - len(old) + 1, 4) if data[at : at + len(old)] == old]
    return [data[:at] + new + data[at + len(old) :] for at in places]


def refused_cheaply(data: bytes, decode: Callable[[bytes, str], Any] = decoded_head) -> None:
    arrow = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        with pytest.raises(CorruptCheckpointError, match=r"'k( batch 0)?'"):
            decode(data, "k")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert pa.total_allocated_bytes() <= arrow + len(data)
    assert peak < MAX_GROWTH * len(data) + 200_000


def test_a_compressed_buffer_that_claims_16_gib_is_refused_before_it_is_decoded() -> None:
    """format F31"""
    attempts = 0
    for size in (12, 16, 24, 32):
        # A compressed buffer begins with its size once decoded, the frame behind it says the same in one byte.
        for claims in patched(BATCH, struct.pack("<q", size), struct.pack("<q", 1 << 34)):
            refused_cheaply(claims, decoded_batch)
            attempts += 1
        for claims in patched(BATCH, struct.pack("<q", size), struct.pack("<q", size + 8)):
            refused_cheaply(claims, decoded_batch)
    assert attempts > 8


def test_a_frame_that_says_another_size_than_its_buffer_is_refused_before_it_is_decoded() -> None:
    """format F104"""
    frames = [at for at in range(len(BATCH)) if BATCH[at : at + 4] == b"\x28\xb5\x2f\xfd"]
    assert len(frames) == 10
    for at in frames:
        # A single segment with a size of eight bytes in the place of what was there.
        huge = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 1 << 34)
        changed = BATCH[:at] + huge + BATCH[at + len(huge) :]
        refused_cheaply(changed, decoded_batch)


def packed_rows(start: pa.Array, stop: pa.Array, rows: int = 3) -> bytes:
    """The batch with other bounds, whatever sense they make."""

    def change(batch: pa.RecordBatch) -> pa.RecordBatch:
        return pa.RecordBatch.from_arrays([batch.columns[0], start, stop, *batch.columns[3:]], schema=batch.schema)

    return rewrite(BATCH, "fragments", change, compression="zstd")


def lists(at: list[int], items: int) -> pa.Array:
    kind = pa.list_(pa.field("item", pa.int64(), nullable=False))
    values = pa.array([0] * items, pa.int64())
    return pa.Array.from_buffers(kind, len(at) - 1, [None, pa.array(at, pa.int32()).buffers()[1]], children=[values])


@pytest.mark.parametrize(("at", "items"), [([0, 4, 2, 4], 4), ([1, 2, 4, 4], 4), ([0, 2, 4, 4], 200)])
def test_offsets_of_a_batch_that_leave_their_items_are_refused(at: list[int], items: int) -> None:
    wrong = lists(at, items)
    refused_cheaply(packed_rows(wrong, wrong), decoded_batch)


def test_a_batch_with_fewer_starts_than_stops_is_refused() -> None:
    refused_cheaply(packed_rows(lists([0, 2, 4, 4], 4), lists([0, 2, 4, 5], 5)), decoded_batch)


@pytest.mark.parametrize("claim", [2**31 - 1, 2**31, 2**40, 2**63 - 1, -1, -(2**63)])
def test_lengths_that_the_bytes_do_not_have_are_refused(claim: int) -> None:
    """format F34"""
    attempts = 0
    for length in (1, 2, 3, 12, 16, 24):
        for changed in patched(HEAD, struct.pack("<q", length), struct.pack("<q", claim)):
            attempts += 1
            try:
                decoded_head(changed)
            except CorruptCheckpointError:
                refused_cheaply(changed)
    assert attempts > 10


def test_a_huge_body_is_refused() -> None:
    data = encode_files(file_rows())
    refused = 0
    for at in range(0, len(data) - 8, 8):
        changed = data[:at] + struct.pack("<q", 1 << 60) + data[at + 8 :]
        try:
            decode_files(changed, "k")
        except CorruptCheckpointError as error:
            refused += "body of 1152921504606846976 bytes" in str(error)
            refused_cheaply(changed, decode_files)
    assert refused == 1


def test_deeply_nested_schemas_are_refused() -> None:
    """format F33"""
    kind = pa.int64()
    for _ in range(60):
        kind = pa.list_(kind)
    batch = pa.record_batch([pa.nulls(0, kind)], names=["ranks"])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    nested = sink.getvalue().to_pybytes()
    begin, _ = walk_bounds(HEAD)[2]
    refused_cheaply(HEAD[:begin] + nested)
    refused_cheaply(nested, decode_files)


def test_dictionary_batches_are_refused() -> None:
    """format F31"""

    def encoded(batch: pa.RecordBatch) -> pa.RecordBatch:
        return pa.record_batch([batch.columns[0].dictionary_encode(), *batch.columns[1:]], names=batch.schema.names)

    data = rewrite(HEAD, "tensors", encoded)
    refused_cheaply(data)
    # A dictionary batch where the record batch is due, behind the right schema.
    (begin, end), (_, other_end) = walk_bounds(HEAD)[0], walk_bounds(data)[0]
    schema = begin + 8 + struct.unpack_from("<i", HEAD, 4)[0]
    dictionary = 8 + struct.unpack_from("<i", data, 4)[0]
    refused_cheaply(HEAD[:schema] + data[dictionary:other_end] + HEAD[end:])


@pytest.mark.parametrize("offsets", [(0, 9, 9), (0, -1, 2), (1, 2, 2), (0, 2, 1), (0, 2**31 - 1, 2)])
def test_offsets_that_leave_their_column_are_refused(offsets: tuple[int, ...]) -> None:
    data = HEAD
    old = struct.pack("<4i", 0, 2, 2, 4)
    attempts = patched(data, old, struct.pack("<4i", *offsets, 4))
    assert len(attempts) == 1
    for changed in attempts:
        refused_cheaply(changed)


def test_names_that_are_no_utf8_are_refused() -> None:
    data = HEAD
    assert data.count(b"h0h1") == 1
    refused_cheaply(data.replace(b"h0h1", b"h0\xff\xff"))


@pytest.mark.parametrize("data", [b"", b"\xff" * 4, END, END * 4, b"\xff" * 64, bytes(64), b"ARROW1\0\0" + bytes(64)])
def test_what_is_no_stream_is_refused(data: bytes) -> None:
    refused_cheaply(data)
    refused_cheaply(data, decoded_batch)
    refused_cheaply(data, decode_files)


def sealed(text: bytes) -> bytes:
    return text + b',"sha256":"' + hashlib.sha256(text).hexdigest().encode() + b'"}\n'


ENVELOPE = b'{"kind":"objects","version":1,"requires":[],"options":{},"objects":{"a":'


@pytest.mark.parametrize(
    "value",
    [
        b"[" * 1_000_000,
        b'{"a":' * 300_000,
        b"9" * 1_000_000,
        b"1." + b"9" * 1_000_000,
        b"[" + b"[]," * 100_000 + b"[]]}",
        b"[" + b'{"$":"tuple","v":[]},' * 20_000 + b"0]}",
        b'{"$":"int","v":"0x' + b"f" * 1_000_000 + b'"}}',
        b'{"$":"bytes","v":"' + b"A" * 1_000_000 + b'"}}',
        b'{"$":"set","v":[' + b"".join(b"%d," % (i << 61) for i in range(4)) + b"0]}}",
        b'{"$":"array","lib":"numpy","dtype":"int8","shape":[' + b"0," * 30 + b'0],"data":""}}',
    ],
    ids=lambda value: value[:24].decode(),
)
def test_json_that_is_deep_long_or_wide_costs_in_proportion(value: bytes) -> None:
    """format F11, F77"""
    data = sealed(ENVELOPE + value)
    tracemalloc.start()
    try:
        objects, _ = decode_objects(data, "k")
        decode_object(objects["a"])
    except CorruptCheckpointError:
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MAX_GROWTH * len(data) + 200_000
