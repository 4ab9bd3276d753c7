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
from dscheck.manifest.arrow import decode_files, decode_plan, encode_files, encode_plan
from dscheck.manifest.objects import decode_object, decode_objects
from tests.manifest.test_arrow import END, file_rows, rewrite, walk_bounds
from tests.manifest.test_plan import PLAN

MAX_GROWTH = 48
"""Python's smallest list, "[]," in three bytes of JSON, takes 64, and as many once more when it is decoded."""

ATTACKS = {"plan": 2000, "files": 800, "record": 500, "tombstone": 200, "term": 300, "objects": 500}


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


def refused_cheaply(data: bytes, decode: Callable[[bytes, str], Any] = decode_plan) -> None:
    arrow = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        with pytest.raises(CorruptCheckpointError, match="'k'"):
            decode(data, "k")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert pa.total_allocated_bytes() <= arrow + len(data)
    assert peak < MAX_GROWTH * len(data) + 200_000


def test_a_compressed_buffer_that_claims_16_gib_is_refused_before_it_is_decoded() -> None:
    """format F31"""
    for codec in ("lz4", "zstd"):
        whole = encode_plan(PLAN)
        data = rewrite(whole, "fragments", lambda batch: batch, compression=codec)
        for size in (12, 24):
            # A compressed buffer begins with its size once decoded.
            for claims in patched(data, struct.pack("<q", size), struct.pack("<q", 1 << 34)):
                refused_cheaply(claims)


@pytest.mark.parametrize("claim", [2**31 - 1, 2**31, 2**40, 2**63 - 1, -1, -(2**63)])
def test_lengths_that_the_bytes_do_not_have_are_refused(claim: int) -> None:
    """format F34"""
    data = encode_plan(PLAN)
    begin, end = walk_bounds(data)[1]
    body = 24
    attempts = 0
    for length in (3, body, 16, 12):
        for changed in patched(data[begin:end], struct.pack("<q", length), struct.pack("<q", claim)):
            whole = data[:begin] + changed + data[end:]
            attempts += 1
            try:
                decode_plan(whole, "k")
            except CorruptCheckpointError:
                refused_cheaply(whole)
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
    data = encode_plan(PLAN)
    begin, _ = walk_bounds(data)[3]
    refused_cheaply(data[:begin] + nested)
    refused_cheaply(nested, decode_files)


def test_dictionary_batches_are_refused() -> None:
    """format F31"""

    def encoded(batch: pa.RecordBatch) -> pa.RecordBatch:
        return pa.record_batch([batch.columns[0].dictionary_encode(), *batch.columns[1:]], names=batch.schema.names)

    data = rewrite(encode_plan(PLAN), "tensors", encoded)
    refused_cheaply(data)
    # A dictionary batch where the record batch is due, behind the right schema.
    (begin, end), (_, other_end) = walk_bounds(encode_plan(PLAN))[0], walk_bounds(data)[0]
    schema = begin + 8 + struct.unpack_from("<i", encode_plan(PLAN), 4)[0]
    dictionary = 8 + struct.unpack_from("<i", data, 4)[0]
    refused_cheaply(encode_plan(PLAN)[:schema] + data[dictionary:other_end] + encode_plan(PLAN)[end:])


@pytest.mark.parametrize("offsets", [(0, 9, 9), (0, -1, 2), (1, 2, 2), (0, 2, 1), (0, 2**31 - 1, 2)])
def test_offsets_that_leave_their_column_are_refused(offsets: tuple[int, ...]) -> None:
    data = encode_plan(PLAN)
    old = struct.pack("<4i", 0, 2, 4, 4)
    attempts = patched(data, old, struct.pack("<4i", *offsets, 4))
    assert len(attempts) == 2
    for changed in attempts:
        refused_cheaply(changed)


def test_names_that_are_no_utf8_are_refused() -> None:
    data = encode_plan(PLAN)
    assert data.count(b"h0h1") == 1
    refused_cheaply(data.replace(b"h0h1", b"h0\xff\xff"))


@pytest.mark.parametrize("data", [b"", b"\xff" * 4, END, END * 4, b"\xff" * 64, bytes(64), b"ARROW1\0\0" + bytes(64)])
def test_what_is_no_stream_is_refused(data: bytes) -> None:
    refused_cheaply(data)
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
