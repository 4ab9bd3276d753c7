"""Tables as Arrow IPC streams: lists of Python values into columns, and back after every check."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import chain, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import zstandard
from numpy.typing import DTypeLike, NDArray

from dscheck.errors import LayoutError
from dscheck.layout.boxes import Ints
from dscheck.manifest.messages import MAX_ROWS, PADDING, Column, Packed, walk, walk_packed

LITTLE: dict[int, np.dtype[Any]] = {4: np.dtype("<i4"), 8: np.dtype("<i8")}
_OF_DTYPE = {np.dtype(np.int32): pa.int32(), np.dtype(np.int64): pa.int64()}
_OF_THREAD = threading.local()


def array(values: NDArray[Any]) -> pa.Array:
    """A column over the memory of int32 or int64. pa.array() would import pandas, where it is: 0.3 s under the GIL."""
    values = np.ascontiguousarray(values)
    return pa.Array.from_buffers(_OF_DTYPE[values.dtype], len(values), [None, pa.py_buffer(values)])


def as_numpy(column: pa.Array) -> NDArray[Any]:
    """The memory of a column of integers; to_numpy() would import pandas as well."""
    width = column.type.bit_width // 8
    if not len(column):
        return np.empty(0, LITTLE[width])
    return np.frombuffer(column.buffers()[1], LITTLE[width], len(column), column.offset * width)


def ints(values: list[int], dtype: DTypeLike) -> pa.Array:
    """A column of integers. Raises OverflowError when one does not fit."""
    return array(np.array(values, dtype))


def texts(values: Iterable[str]) -> pa.Array:
    """A column of UTF-8. Raises LayoutError for what UTF-8 cannot hold, a lone surrogate."""
    try:
        encoded = [value.encode() for value in values]
    except UnicodeEncodeError as error:
        raise LayoutError(f"the name {error.object!r} is no Unicode text") from error
    ends = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)), out=ends[1:])
    if ends[-1] > MAX_ROWS:
        raise LayoutError(f"{ends[-1]} bytes of text in one column, at most {MAX_ROWS} fit")
    buffers = [None, pa.py_buffer(ends.astype(np.int32)), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(pa.utf8(), len(encoded), buffers)


def digests(values: Sequence[bytes]) -> pa.Array:
    """A column of SHA-256s, 32 bytes each."""
    return pa.Array.from_buffers(pa.binary(32), len(values), [None, pa.py_buffer(b"".join(values))])


def lists(rows: Sequence[Sequence[int]], dtype: DTypeLike) -> pa.Array:
    """A column of lists of integers."""
    count = sum(map(len, rows))
    return _list_array(rows, array(np.fromiter(chain.from_iterable(rows), dtype, count)))


def text_lists(rows: Sequence[Sequence[str]]) -> pa.Array:
    """A column of lists of UTF-8."""
    return _list_array(rows, texts(chain.from_iterable(rows)))


def ragged(at: Ints, items: Ints) -> pa.Array:
    """A column of lists of int64: row i is items[at[i] : at[i + 1]], in place."""
    if len(items) > MAX_ROWS:
        raise LayoutError(f"{len(items)} items of lists in one column, at most {MAX_ROWS} fit")
    field = pa.field("item", pa.int64(), nullable=False)
    return pa.ListArray.from_arrays(array(at.astype(np.int32)), array(items), type=pa.list_(field))


def offsets(column: pa.Array) -> Ints:
    """Where each list of a column begins in its items, and the last one ends."""
    # Arrow may leave out the offsets of no rows.
    found: Ints = as_numpy(column.offsets).astype(np.int64) if len(column) else np.zeros(1, np.int64)
    return found


def _list_array(rows: Sequence[Sequence[Any]], items: pa.Array) -> pa.Array:
    if len(items) > MAX_ROWS:
        raise LayoutError(f"{len(items)} items of lists in one column, at most {MAX_ROWS} fit")
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(np.fromiter(map(len, rows), np.int32, len(rows)), out=offsets[1:])
    field = pa.field("item", items.type, nullable=False)
    return pa.ListArray.from_arrays(array(offsets), items, type=pa.list_(field))


def _schema(table: str, columns: Sequence[Column], metadata: dict[str, str]) -> pa.Schema:
    return pa.schema(list(map(_field, columns)), metadata={"dscheck.table": table, **metadata})


def _field(column: Column) -> pa.Field:
    if column.item:
        kind = pa.list_(_field(column.item))
    elif column.kind == "int":
        kind = pa.int32() if column.width == 4 else pa.int64()
    else:
        kind = pa.binary(column.width) if column.kind == "bytes" else pa.utf8()
    return pa.field(column.name, kind, nullable=False)


def write(*streams: tuple[str, Sequence[Column], dict[str, str], list[pa.Array]]) -> bytes:
    """Streams back to back: each is a table's name, its columns, further metadata of its schema, and its values."""
    sink = pa.BufferOutputStream()
    for table, columns, metadata, arrays in streams:
        schema = _schema(table, columns, metadata)
        with pa.ipc.new_stream(sink, schema, options=pa.ipc.IpcWriteOptions(compression=None)) as writer:
            writer.write_batch(pa.record_batch(arrays, schema=schema))
    data: bytes = sink.getvalue().to_pybytes()
    return data


def write_packed(table: str, columns: Sequence[Column], arrays: list[pa.Array]) -> bytes:
    """One stream of a batch whose buffers are compressed by zstd."""
    schema = _schema(table, columns, {})
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd", use_threads=False)
    with pa.ipc.new_stream(sink, schema, options=options) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=schema))
    data: bytes = sink.getvalue().to_pybytes()
    return data


def read_packed(data: bytes, table: str, columns: Sequence[Column], rows: int) -> list[tuple[NDArray[Any], ...]]:
    """Each column of a batch of `rows`, integers or lists of them, as its numbers, or its offsets and its items.

    Raises ValueError, also for offsets that do not ascend from 0 to the number of items, or ArrowException.
    """
    message, found_rows, packed = walk_packed(data, columns)
    if found_rows != rows:
        raise ValueError(f"a batch of {found_rows} rows, {rows} expected")
    _check_metadata(message, table, tuple(columns))
    buffers, zstd = iter(packed), _zstd()

    def numbers(column: Column, count: int, width: int) -> NDArray[Any]:
        raw = _decoded(next(buffers), zstd)
        if not count * width <= len(raw) < count * width + PADDING:
            raise ValueError(f"column '{column.name}' has {len(raw)} bytes for {count} items")
        return np.frombuffer(raw, LITTLE[width], count)

    found: list[tuple[NDArray[Any], ...]] = []
    for column in columns:
        next(buffers)
        if column.item is None:
            found.append((numbers(column, rows, column.width),))
            continue
        at = numbers(column, rows + 1, 4)
        if at[0] or (at[1:] < at[:-1]).any():
            raise ValueError(f"column '{column.name}' has offsets that do not ascend from 0")
        next(buffers)
        found.append((at, numbers(column, int(at[-1]), column.item.width)))
    return found


def _zstd() -> zstandard.ZstdDecompressor:
    """One for each thread: to make one takes as long as to decode a buffer."""
    if not hasattr(_OF_THREAD, "zstd"):
        _OF_THREAD.zstd = zstandard.ZstdDecompressor()
    found: zstandard.ZstdDecompressor = _OF_THREAD.zstd
    return found


@lru_cache(16)
def _check_metadata(message: bytes, table: str, columns: tuple[Column, ...]) -> None:
    found = pa.ipc.read_schema(pa.py_buffer(message))
    if not found.equals(_schema(table, columns, {}), check_metadata=True):
        raise ValueError(f"table '{table}' has another schema")


def _decoded(packed: Packed, zstd: zstandard.ZstdDecompressor) -> bytes | memoryview:
    if packed.nbytes is None:
        return packed.data
    if not packed.nbytes:
        return b""
    try:
        # A frame may leave its size out, and must not say another one: as much as it says would be allocated.
        if zstandard.frame_content_size(packed.data) not in (packed.nbytes, -1):
            raise ValueError("a buffer that is compressed to another size than it says")
        raw: bytes = zstd.decompress(packed.data, max_output_size=packed.nbytes)
    except zstandard.ZstdError as error:
        raise ValueError(f"a buffer that does not decode: {error}") from error
    if len(raw) != packed.nbytes:
        raise ValueError(f"a buffer of {len(raw)} bytes once decoded, {packed.nbytes} expected")
    return raw


def read(data: bytes, *streams: tuple[str, Sequence[Column]]) -> list[pa.RecordBatch]:
    """One valid batch a stream, in place. Raises ValueError, OSError or ArrowException."""
    batches = []
    for (begin, end), (table, columns) in zip(walk(data, [c for _, c in streams]), streams, strict=True):
        batch = pa.ipc.open_stream(pa.py_buffer(data).slice(begin, end - begin)).read_next_batch()
        metadata = {name.decode(): text.decode() for name, text in (batch.schema.metadata or {}).items()}
        expected = {"dscheck.table"} | ({"dscheck.block_bytes"} if table == "batches" else set())
        if metadata.keys() != expected or metadata["dscheck.table"] != table:
            raise ValueError(f"the metadata of table '{table}' is {metadata}")
        if not batch.schema.equals(_schema(table, columns, metadata), check_metadata=True):
            raise ValueError(f"table '{table}' has another schema")
        batch.validate(full=True)
        batches.append(batch)
    return batches


def columns(batch: pa.RecordBatch) -> list[list[Any]]:
    """Each column as a list: ints, strings, bytes, or tuples of them."""
    return [_values(column) for column in batch.columns]


def _values(array: pa.Array) -> list[Any]:
    if pa.types.is_integer(array.type):
        whole: list[Any] = as_numpy(array).tolist()
        return whole
    if not pa.types.is_list(array.type):
        plain: list[Any] = array.to_pylist()
        return plain
    items = _values(array.values)
    return [tuple(items[begin:end]) for begin, end in pairwise(offsets(array).tolist())]
