"""Arrow messages made by hand, flatbuffer by flatbuffer, so that each rule of messages.py can be broken alone."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

END = b"\xff\xff\xff\xff\0\0\0\0"


@dataclass
class Table:
    """Slots in order: (struct code, number), bytes for a string, Table, list of Tables, list of int pairs, or None."""

    slots: list[Any]


def flat(root: Table) -> bytes:
    """The root table as a flatbuffer, padded to 8 bytes."""
    data = bytearray(4)
    _refer(data, 0, root)
    return bytes(data) + bytes(-len(data) % 8)


def _refer(data: bytearray, at: int, value: Any) -> None:
    """Append `value` and store at `at` how far away it is."""
    data += bytes(-len(data) % 8)
    if isinstance(value, Table):
        start = len(data) + (2 * len(value.slots) + 4 + 7) // 8 * 8
        struct.pack_into("<I", data, at, start - at)
        _append_table(data, start, value)
        return
    # Struct vectors are aligned behind their count.
    data += bytes(4) if value and isinstance(value[0], tuple) else b""
    struct.pack_into("<I", data, at, len(data) - at)
    data += struct.pack("<I", len(value))
    if isinstance(value, bytes):
        data += value + b"\0"
    elif value and isinstance(value[0], tuple):
        data += b"".join(struct.pack("<qq", *pair) for pair in value)
    else:
        first = len(data)
        data += bytes(4 * len(value))
        for i, item in enumerate(value):
            _refer(data, first + 4 * i, item)


def _append_table(data: bytearray, start: int, table: Table) -> None:
    present = [slot is not None for slot in table.slots]
    # Every slot takes 8 bytes behind the 4 of the vtable's distance and 4 of padding.
    offsets = [8 + 8 * i if there else 0 for i, there in enumerate(present)]
    vtable = struct.pack(f"<{2 + len(offsets)}H", 4 + 2 * len(offsets), 8 + 8 * len(offsets), *offsets)
    at = len(data)
    data += vtable + bytes(start - at - len(vtable))
    data += struct.pack("<i", start - at) + bytes(4 + 8 * len(offsets))
    for offset, slot in zip(offsets, table.slots, strict=True):
        if isinstance(slot, tuple):
            struct.pack_into("<" + slot[0], data, start + offset, slot[1])
        elif slot is not None:
            _refer(data, start + offset, slot)


def message(kind: int, header: Table, body: bytes = b"", **changed: Any) -> bytes:
    """One encapsulated message, a prefix, metadata and body; `changed`: version, body_bytes, size, metadata."""
    metadata = flat(
        Table(
            [
                ("h", changed.get("version", 4)),
                ("B", kind),
                header,
                ("q", changed.get("body_bytes", len(body))),
                changed.get("metadata"),
            ]
        )
    )
    return b"\xff\xff\xff\xff" + struct.pack("<i", changed.get("size", len(metadata))) + metadata + body


def holders_schema(**changed: Any) -> Table:
    """The schema of a list<int32> column 'ranks'; `changed`: endianness, features, and slots of the field."""
    item = Table([b"item", ("B", 0), ("B", 2), Table([("i", 32), ("B", 1)]), None, None, None])
    field = Table(
        [
            changed.get("name", b"ranks"),
            ("B", changed.get("nullable", 0)),
            ("B", changed.get("kind", 12)),
            Table([]),
            changed.get("dictionary"),
            changed.get("children", [item]),
            changed.get("field_metadata"),
        ]
    )
    return Table([("h", changed.get("endianness", 0)), [field], None, changed.get("features")])


def holders_batch(**changed: Any) -> Table:
    """The batch of two rows, [1] and [2, 3], as laid out in BODY."""
    return Table(
        [
            ("q", changed.get("rows", 2)),
            changed.get("nodes", [(2, 0), (3, 0)]),
            changed.get("buffers", [(0, 0), (0, 12), (16, 0), (16, 12)]),
            changed.get("compression"),
            changed.get("variadic"),
        ]
    )


BODY = struct.pack("<3i4x3i4x", 0, 1, 3, 1, 2, 3)
