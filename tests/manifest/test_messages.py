"""The walk over Arrow messages alone: each rule broken once, with no pyarrow behind it that would also object."""

from __future__ import annotations

import struct
from typing import Any

import pyarrow as pa
import pytest

from dscheck.manifest.arrow import FRAGMENTS, HOLDERS
from dscheck.manifest.messages import walk, walk_packed
from tests.manifest.flat import BODY, END, Table, flat, holders_batch, holders_schema, message
from tests.manifest.stored import BATCH
from tests.manifest.test_arrow import OTHER_SCHEMAS, rewrite


def stream(schema: bytes | None = None, batch: bytes | None = None) -> bytes:
    return (schema or message(1, holders_schema())) + (batch or message(3, holders_batch(), BODY)) + END


def refuses(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        walk(data, [HOLDERS])


def test_the_handmade_stream_is_read_by_arrow_and_by_the_walk() -> None:
    """format F30, F31"""
    data = stream()
    assert pa.ipc.open_stream(data).read_all().to_pylist() == [{"ranks": [1]}, {"ranks": [2, 3]}]
    assert walk(data, [HOLDERS]) == [(0, len(data))]


@pytest.mark.parametrize(
    "changed",
    [
        {"endianness": 1},
        {"features": [(1, 1)]},
        {"nullable": 1},
        {"name": b"rank"},
        {"name": b"\xff"},
        {"kind": 5},
        {"children": []},
        {"children": None},
        {"dictionary": Table([("q", 0)])},
        {"field_metadata": [Table([b"k", b"v"])]},
    ],
    ids=str,
)
def test_a_schema_that_is_more_than_plain_is_refused(changed: dict[str, Any]) -> None:
    """format F31, F33"""
    refuses(stream(schema=message(1, holders_schema(**changed))))


@pytest.mark.parametrize(
    "changed",
    [
        {"rows": -1},
        {"rows": -1, "nodes": [(-1, 0), (0, 0)], "buffers": [(0, 0)] * 4},
        {"rows": 2**31},
        {"rows": 3},
        {"nodes": [(3, 0), (3, 0)]},
        {"nodes": [(2, 1), (3, 0)]},
        {"nodes": [(2, 0), (2, 0)]},
        {"nodes": [(2, 0)]},
        {"nodes": [(2, 0), (3, 0), (0, 0)]},
        {"buffers": [(0, 0), (0, 12), (16, 0)]},
        {"buffers": [(0, 0), (0, 12), (16, 0), (16, 12), (32, 0)]},
        {"buffers": [(0, 8), (8, 12), (24, 0), (24, 12)]},
        {"buffers": [(0, 0), (0, 12), (16, 0), (20, 12)]},
        {"buffers": [(0, 0), (0, 12), (16, 0), (8, 12)]},
        {"buffers": [(0, 0), (0, 12), (16, 0), (24, 12)]},
        {"buffers": [(0, 0), (0, 12), (16, 0), (16, 8)]},
        {"buffers": [(0, 0), (0, 8), (16, 0), (16, 12)]},
        {"buffers": [(0, 0), (0, 12), (16, 0), (16, -4)]},
        {"buffers": [(0, 0), (-8, 12), (16, 0), (16, 12)]},
        {"compression": Table([])},
        {"variadic": [(1, 1)]},
    ],
    ids=str,
)
def test_a_batch_whose_lengths_disagree_is_refused(changed: dict[str, Any]) -> None:
    """format F31, F34"""
    refuses(stream(batch=message(3, holders_batch(**changed), BODY)))


def test_a_buffer_may_be_padded_to_64_bytes_and_no_further() -> None:
    for size, fine in ((64, True), (72, False)):
        buffers = [(0, 0), (0, 12), (16, 0), (16, size)]
        data = stream(batch=message(3, holders_batch(buffers=buffers), BODY + bytes(64)))
        if fine:
            assert walk(data, [HOLDERS])
        else:
            refuses(data)


def test_a_validity_bitmap_is_refused() -> None:
    """format F31"""
    buffers = [(0, 8), (8, 12), (24, 0), (24, 12)]
    refuses(stream(batch=message(3, holders_batch(buffers=buffers), b"\xff" * 8 + BODY)))
    moved = [(0, 0), (8, 12), (24, 0), (24, 12)]
    assert walk(stream(batch=message(3, holders_batch(buffers=moved), b"\xff" * 8 + BODY)), [HOLDERS])


def test_a_negative_number_of_items_is_refused() -> None:
    changed = {"nodes": [(2, 0), (-1, 0)], "buffers": [(0, 0), (0, 12), (16, 0), (16, 0)]}
    refuses(stream(batch=message(3, holders_batch(**changed), struct.pack("<3i4x", 0, 1, -1))))


@pytest.mark.parametrize("offsets", [(1, 1, 3), (0, 1, -1), (0, 1, 2), (0, 1, 4)])
def test_offsets_begin_at_zero_and_end_with_the_items(offsets: tuple[int, ...]) -> None:
    refuses(stream(batch=message(3, holders_batch(), struct.pack("<3i", *offsets) + BODY[12:])))


@pytest.mark.parametrize(
    "changed",
    [
        {"version": 3},
        {"body_bytes": -8},
        {"body_bytes": 1 << 40},
        {"body_bytes": 36},
        {"metadata": [Table([b"k", b"v"])]},
        {"size": 0},
        {"size": -8},
        {"size": 1 << 30},
        {"size": 12},
    ],
    ids=str,
)
def test_a_message_of_another_frame_is_refused(changed: dict[str, Any]) -> None:
    """format F30"""
    refuses(stream(batch=message(3, holders_batch(), BODY + bytes(8), **changed)))
    refuses(stream(schema=message(1, holders_schema(), **changed)))


def test_a_schema_has_no_body() -> None:
    """format F30"""
    refuses(stream(schema=message(1, holders_schema(), bytes(8))))
    # Arrow would take the batch for that body, and what follows for the batch.
    refuses(stream(schema=message(1, holders_schema(), body_bytes=8)))


def test_messages_come_in_their_order() -> None:
    """format F30"""
    refuses(stream(schema=message(3, holders_batch(), BODY)))
    refuses(stream(batch=message(2, holders_batch(), BODY)))
    refuses(stream()[8:])
    refuses(stream() + b"\0")
    refuses(stream()[: -len(END)])
    refuses(stream()[: -len(END)] + bytes(8))


def test_no_offset_of_a_flatbuffer_leads_outside() -> None:
    whole = stream()
    size = struct.unpack_from("<i", whole, 4)[0]
    for at in range(8, 8 + size - 4, 2):
        for value in (0xFFFFFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFF, size):
            data = whole[:at] + struct.pack("<I", value) + whole[at + 4 :]
            try:
                walk(data, [HOLDERS])
            except ValueError:
                continue


def test_an_empty_flatbuffer_is_refused() -> None:
    for metadata in (bytes(8), b"\xff" * 8, flat(Table([])), struct.pack("<Ii", 4, -4), struct.pack("<Ii", 4, 4)):
        refuses(b"\xff\xff\xff\xff" + struct.pack("<i", len(metadata)) + metadata)


# The schema's own metadata is for the caller of the walk.
WALKED = [
    name for name in OTHER_SCHEMAS if name == "field metadata" or not any(w in name for w in ("metadata", "block"))
]


@pytest.mark.parametrize("name", [name for name in WALKED if name != "other table"])
def test_the_walk_alone_refuses_another_schema(name: str) -> None:
    """format F31, F33"""
    with pytest.raises(ValueError, match=r"column|schema|message"):
        walk_packed(rewrite(BATCH, "fragments", OTHER_SCHEMAS[name], compression="zstd"), FRAGMENTS)


PACKED = b"".join(struct.pack("<q", len(data)) + data for data in (BODY[:12] + bytes(4), BODY[16:]))


def packed(**changed: Any) -> bytes:
    """The same batch, its buffers stored with their sizes in front, as if zstd had made them longer."""
    compression = Table([("b", changed.pop("codec", 1)), ("b", changed.pop("method", 0))])
    body = changed.pop("body", PACKED)
    buffers = [(0, 0), (0, 24), (24, 0), (24, 24)]
    return stream(batch=message(3, holders_batch(**{"buffers": buffers, "compression": compression} | changed), body))


def test_a_packed_batch_is_walked() -> None:
    """format F104"""
    schema, rows, buffers = walk_packed(packed(), HOLDERS)
    assert schema == message(1, holders_schema())
    assert rows == 2
    assert [buffer.nbytes for buffer in buffers] == [0, 16, 0, 16]
    raw = walk_packed(packed(body=struct.pack("<q", -1) + PACKED[8:]), HOLDERS)[2][1]
    assert (bytes(raw.data), raw.nbytes) == (PACKED[8:24], None)


@pytest.mark.parametrize(
    "changed",
    [
        {"codec": 0},
        {"codec": 2},
        {"method": 1},
        {"compression": None},
        {"variadic": [(1, 1)]},
        {"rows": 3},
        {"nodes": [(2, 0), (129, 0)]},
        {"nodes": [(2, 0), (-1, 0)]},
        {"nodes": [(2, 0)]},
        {"nodes": [(2, 0), (3, 1)]},
        {"nodes": [(2, 0), (30, 0)]},
        {"buffers": [(0, 8), (0, 24), (24, 0), (24, 24)]},
        {"buffers": [(0, 0), (0, 24), (24, 0), (24, 32)]},
        {"buffers": [(0, 0), (0, 24), (24, 0), (16, 24)]},
        {"buffers": [(0, 0), (0, 24), (24, 0), (28, 20)]},
        {"buffers": [(0, 0), (0, 24), (24, 0), (24, -8)]},
        {"buffers": [(0, 0), (0, 24), (24, 0), (24, 4)]},
        {"buffers": [(0, 0), (0, 24), (24, 0)]},
        {"buffers": [(0, 0), (0, 24), (24, 0), (24, 24), (48, 0)]},
        {"body": struct.pack("<q", 8) + PACKED[8:]},
        {"body": struct.pack("<q", 72) + PACKED[8:]},
        {"body": struct.pack("<q", -2) + PACKED[8:]},
        {"body": struct.pack("<q", 1 << 62) + PACKED[8:]},
    ],
    ids=str,
)
def test_a_packed_batch_whose_lengths_disagree_is_refused(changed: dict[str, Any]) -> None:
    """format F104"""
    with pytest.raises(ValueError, match=r"."):
        walk_packed(packed(**changed), HOLDERS)
