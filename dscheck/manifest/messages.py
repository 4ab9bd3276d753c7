"""A walk over Arrow IPC messages that proves them harmless before pyarrow decodes them.

From strangers' bytes pyarrow allocated 16 GiB for a 538-byte file and crashed the interpreter on single flipped bits.
So each flatbuffer is read here first, every access inside its bounds: the schema is exactly the expected one, and each
buffer lies in the body with the length that its column's rows ask for. Sources: Arrow's Message.fbs and Schema.fbs.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

MAX_ROWS = 2**31 - 1
MAX_LIST = 64
"""Items in a row of a compressed batch at most, as a tensor has dimensions: its offsets are not decoded yet."""

_CONTINUATION = b"\xff\xff\xff\xff"
_END = _CONTINUATION + b"\0\0\0\0"
_ZSTD = 1
_V5, _SCHEMA, _RECORD_BATCH = 4, 1, 3
_TYPES = {"int": 2, "utf8": 5, "list": 12, "bytes": 15}
PADDING = 64
_LAYOUTS = {code: struct.Struct(code) for code in ("<b", "<B", "<h", "<H", "<i", "<I", "<q")}


class Column(NamedTuple):
    """One column without nulls: signed integers or byte strings of `width` bytes, UTF-8 text, or lists of `item`."""

    name: str
    kind: Literal["int", "utf8", "list", "bytes"]
    width: int = 0
    item: Column | None = None


def walk(data: bytes, streams: Sequence[Sequence[Column]]) -> list[tuple[int, int]]:
    """Where each stream begins and ends, when `data` is exactly these streams, each a schema and one plain batch.

    Raises ValueError for anything else; nothing is allocated that grows with what `data` claims.
    """
    bounds, position = [], 0
    for columns in streams:
        begin = position
        position = _checked_schema(data, position, columns)
        batch, body_bytes, position = _message(data, position, _RECORD_BATCH)
        _Batch(batch, memoryview(data)[position : position + body_bytes]).check(columns)
        position = _stream_end(data, position + body_bytes)
        bounds.append((begin, position))
    if position != len(data):
        raise ValueError(f"{len(data) - position} bytes follow the last stream")
    return bounds


class Packed(NamedTuple):
    """One buffer of a compressed batch: its bytes, and how many it has once they are decoded; None: they are raw."""

    data: memoryview
    nbytes: int | None


_EMPTY = Packed(memoryview(b""), 0)


def walk_packed(data: bytes, columns: Sequence[Column]) -> tuple[bytes, int, list[Packed]]:
    """The schema's message, the number of rows, and all buffers in Arrow's order: of each column an empty bitmap, its
    numbers, or its offsets, which are still to be checked, and the same of its items.

    `data` is one stream as for `walk`, with each buffer compressed by zstd. Raises ValueError for anything else.
    """
    position = _checked_schema(data, 0, columns)
    schema = data[:position]
    table, body_bytes, position = _message(data, position, _RECORD_BATCH)
    if _stream_end(data, position + body_bytes) != len(data):
        raise ValueError("bytes follow the stream")
    return schema, *_packed_buffers(table, memoryview(data)[position : position + body_bytes], columns)


def _checked_schema(data: bytes, position: int, columns: Sequence[Column]) -> int:
    """Where the schema's message ends that begins at `position`, when it is that of these columns."""
    end = position + 8 + _read(memoryview(data), position + 4, "<i")
    _check_schema(data[position:end], tuple(columns))
    return end


def _stream_end(data: bytes, position: int) -> int:
    if data[position : position + len(_END)] != _END:
        raise ValueError("a stream does not end after its one batch")
    return position + len(_END)


@dataclass(frozen=True, slots=True)
class _Table:
    """A flatbuffer table at `at` of `data`. Absent fields read as the default."""

    data: memoryview
    at: int

    def _field(self, slot: int) -> int | None:
        vtable = self.at - _read(self.data, self.at, "<i")
        size = _read(self.data, vtable, "<H")
        entry = 4 + 2 * slot
        offset = _read(self.data, vtable + entry, "<H") if entry + 2 <= size else 0
        return self.at + offset if offset else None

    def has(self, slot: int) -> bool:
        return self._field(slot) is not None

    def number(self, slot: int, code: str, default: int = 0) -> int:
        at = self._field(slot)
        return default if at is None else _read(self.data, at, code)

    def table(self, slot: int) -> _Table:
        at = self._field(slot)
        if at is None:
            raise ValueError("a message lacks a part")
        return _Table(self.data, at + _read(self.data, at, "<I"))

    def vector(self, slot: int, item_bytes: int) -> tuple[int, int]:
        """Where the items of a vector begin, and how many there are; all of them lie inside."""
        at = self._field(slot)
        if at is None:
            return 0, 0
        start = at + _read(self.data, at, "<I")
        count = _read(self.data, start, "<I")
        if start + 4 + count * item_bytes > len(self.data):
            raise ValueError("a vector is longer than its message")
        return start + 4, count

    def tables(self, slot: int) -> Iterator[_Table]:
        start, count = self.vector(slot, 4)
        for at in range(start, start + 4 * count, 4):
            yield _Table(self.data, at + _read(self.data, at, "<I"))

    def text(self, slot: int) -> str:
        start, count = self.vector(slot, 1)
        return bytes(self.data[start : start + count]).decode("utf-8")

    def pairs(self, slot: int) -> Iterator[tuple[int, int]]:
        """A vector of structs of two int64."""
        start, count = self.vector(slot, 16)
        return struct.iter_unpack("<qq", self.data[start : start + 16 * count])


def _read(data: memoryview, at: int, code: str) -> int:
    layout = _LAYOUTS[code]
    if not 0 <= at <= len(data) - layout.size:
        raise ValueError("a message points outside itself")
    number: int = layout.unpack_from(data, at)[0]
    return number


def _message(data: bytes, position: int, kind: int) -> tuple[_Table, int, int]:
    """The header table of the message at `position`, the size of its body, and where that begins."""
    head = memoryview(data)
    if data[position : position + 4] != _CONTINUATION:
        raise ValueError("a message is missing")
    size = _read(head, position + 4, "<i")
    start = position + 8
    if size < 8 or size % 8 or start + size > len(data):
        raise ValueError(f"a message of {size} bytes")
    flat = head[start : start + size]
    message = _Table(flat, _read(flat, 0, "<I"))
    body_bytes = message.number(3, "<q")
    if (message.number(0, "<h"), message.number(1, "<B")) != (_V5, kind) or message.has(4):
        raise ValueError("a message of another kind")
    if body_bytes < 0 or body_bytes % 8 or start + size + body_bytes > len(data):
        raise ValueError(f"a message with a body of {body_bytes} bytes")
    return message.table(2), body_bytes, start + size


@lru_cache(16)  # the batches of a plan have one schema, word by word
def _check_schema(message: bytes, columns: tuple[Column, ...]) -> None:
    schema, body_bytes, end = _message(message, 0, _SCHEMA)
    if body_bytes or end != len(message):
        raise ValueError("a schema has a body")
    # Slot 0 is the byte order (0 is little), 3 features such as compressed bodies. The caller reads slot 2, metadata.
    if schema.number(0, "<h") or schema.has(3):
        raise ValueError("a schema with another byte order, or with features")
    _check_fields(schema, 1, columns)


def _check_fields(parent: _Table, slot: int, columns: Sequence[Column]) -> None:
    if parent.vector(slot, 4)[1] != len(columns):
        raise ValueError(f"a schema of {parent.vector(slot, 4)[1]} columns, {len(columns)} expected")
    for field, column in zip(parent.tables(slot), columns, strict=True):
        if (field.text(0), field.number(2, "<B")) != (column.name, _TYPES[column.kind]):
            raise ValueError(f"no column '{column.name}' of {column.kind} in its place")
        # Nullable, dictionary-encoded, or with metadata, by which a reader would pick an extension type.
        if field.number(1, "<B") or field.has(4) or field.has(6):
            raise ValueError(f"column '{column.name}' is more than plain {column.kind}")
        if _width(field.table(3), column) != column.width:
            raise ValueError(f"column '{column.name}' is not {column.width} bytes wide")
        _check_fields(field, 5, (column.item,) if column.item else ())


def _width(kind: _Table, column: Column) -> int:
    if column.kind == "int":
        # The second slot says signed.
        return kind.number(0, "<i") // 8 if kind.number(1, "<B") else -1
    return kind.number(0, "<i") if column.kind == "bytes" else 0


class _Batch:
    """The walk over one record batch: nodes and buffers in the order of columns, depth first."""

    def __init__(self, batch: _Table, body: memoryview) -> None:
        # Slot 3 is compression, 4 the counts that only string views have.
        if batch.has(3) or batch.has(4):
            raise ValueError("a compressed batch")
        self._body = body
        self._rows = batch.number(0, "<q")
        self._nodes = batch.pairs(1)
        self._buffers = batch.pairs(2)
        self._end = 0

    def check(self, columns: Sequence[Column]) -> None:
        if not 0 <= self._rows <= MAX_ROWS:
            raise ValueError(f"a batch of {self._rows} rows")
        for column in columns:
            self._check(column, self._rows)
        if next(self._nodes, None) is not None or next(self._buffers, None) is not None:
            raise ValueError("a batch with more columns than its schema")

    def _check(self, column: Column, rows: int) -> None:
        if next(self._nodes, None) != (rows, 0):
            raise ValueError(f"column '{column.name}' does not have {rows} rows without nulls")
        if self._buffer(column, 0)[1]:
            raise ValueError(f"column '{column.name}' has a validity bitmap")
        if column.kind in ("int", "bytes"):
            self._buffer(column, rows * column.width)
            return
        items = self._last_offset(column, rows)
        if column.item:
            self._check(column.item, items)
        else:
            self._buffer(column, items)

    def _buffer(self, column: Column, nbytes: int, least: int | None = None) -> tuple[int, int]:
        """The next buffer: behind the one before it, inside the body, with `least` to `nbytes` bytes and padding."""
        offset, size = next(self._buffers, (-1, 0))
        if offset % 8 or offset < self._end or offset + size > len(self._body):
            raise ValueError(f"a buffer of column '{column.name}' is not inside the body")
        if not (nbytes if least is None else least) <= size <= -(-nbytes // PADDING) * PADDING:
            raise ValueError(f"a buffer of column '{column.name}' has {size} bytes, {nbytes} expected")
        self._end = offset + size
        return offset, size

    def _last_offset(self, column: Column, rows: int) -> int:
        """How many items the rows' offsets speak of. That they ascend in between is for Arrow's full validation."""
        # Without rows Arrow may leave out the one offset.
        offset, size = self._buffer(column, 4 * (rows + 1), None if rows else 0)
        if not size:
            return 0
        first, last = _read(self._body, offset, "<i"), _read(self._body, offset + 4 * rows, "<i")
        if size < 4 or first != 0 or last < 0:
            raise ValueError(f"column '{column.name}' has offsets from {first} to {last}")
        return last


def _packed_buffers(batch: _Table, body: memoryview, columns: Sequence[Column]) -> tuple[int, list[Packed]]:
    """The rows of a compressed batch, and its buffers, whose lengths once decoded are those that the rows ask for."""
    if batch.has(4) or not batch.has(3):
        raise ValueError("a batch that is not compressed")
    compression = batch.table(3)
    if (compression.number(0, "<b"), compression.number(1, "<b")) != (_ZSTD, 0):
        raise ValueError("a batch that is not compressed by zstd, buffer by buffer")
    rows, nodes, buffers = batch.number(0, "<q"), list(batch.pairs(1)), list(batch.pairs(2))
    if not 0 <= rows <= MAX_ROWS:
        raise ValueError(f"a batch of {rows} rows")
    wanted = _wanted(columns, rows, nodes)
    if len(buffers) != len(wanted):
        raise ValueError("a batch with other columns than its schema")
    found: list[Packed] = []
    end, nbytes_there = 0, len(body)
    for (name, nbytes), (offset, size) in zip(wanted, buffers, strict=True):
        if offset % 8 or offset < end or offset + size > nbytes_there or 0 < size < 8 or size < 0:
            raise ValueError(f"a buffer of column '{name}' is not inside the body")
        end = offset + size
        if not size and not nbytes:
            found.append(_EMPTY)
            continue
        says = _read(body, offset, "<q") if size else 0
        decoded = size - 8 if says == -1 else says
        if not nbytes <= decoded <= -(-nbytes // PADDING) * PADDING or not nbytes:
            raise ValueError(f"a buffer of column '{name}' has {decoded} bytes decoded, {nbytes} expected")
        found.append(Packed(body[offset + min(8, size) : end], None if says == -1 else says))
    return rows, found


def _wanted(columns: Sequence[Column], rows: int, nodes: Sequence[tuple[int, int]]) -> list[tuple[str, int]]:
    """The column of each buffer, and its bytes once decoded: an empty bitmap, then numbers, or offsets and items."""
    found, node = [], 0
    for column in columns:
        if nodes[node : node + 1] != [(rows, 0)]:
            raise ValueError(f"column '{column.name}' does not have {rows} rows without nulls")
        node += 1
        if column.item is None:
            found += [(column.name, 0), (column.name, rows * column.width)]
            continue
        items, nulls = nodes[node] if node < len(nodes) else (-1, 0)
        if nulls or not 0 <= items <= rows * MAX_LIST:
            raise ValueError(f"column '{column.name}' has {items} items in {rows} rows, and {nulls} nulls")
        node += 1
        found += [(column.name, 0), (column.name, 4 * (rows + 1)), (column.name, 0)]
        found.append((column.name, items * column.item.width))
    if node < len(nodes):
        raise ValueError("a batch with more columns than its schema")
    return found
