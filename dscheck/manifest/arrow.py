"""Plans and `files.arrow` as Arrow IPC streams, back to back. Source: docs/format.md.

Callers have compared size and SHA-256 with the record before they decode. What is decoded is still a stranger's: see
messages.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import DTypeLike

from dscheck.errors import CorruptCheckpointError, LayoutError
from dscheck.layout.region import Region
from dscheck.manifest.files import Extent, FileRow, validate_files
from dscheck.manifest.messages import Column, walk
from dscheck.manifest.plan import Fragment, Plan, RankRow, TensorRow


def _int32(name: str) -> Column:
    return Column(name, "int", 4)


def _int64(name: str) -> Column:
    return Column(name, "int", 8)


def _utf8(name: str) -> Column:
    return Column(name, "utf8")


def _list(name: str, item: Column) -> Column:
    return Column(name, "list", item=item)


TENSORS = (_utf8("name"), _utf8("dtype"), _list("shape", _int64("item")), _list("aliases", _utf8("item")))
FRAGMENTS = (
    _int32("tensor"),
    _list("start", _int64("item")),
    _list("stop", _int64("item")),
    _int32("writer"),
    _int64("offset"),
    _int64("nbytes"),
    _int64("first_block"),
    _int32("holders"),
)
RANKS = (
    _int32("rank"),
    _utf8("host"),
    _list("mesh_dims", _utf8("item")),
    _list("mesh_coordinates", _int32("item")),
)
HOLDERS = (_list("ranks", _int32("item")),)
FILES = (
    _int32("rank"),
    _int64("size"),
    _int64("blocks"),
    *(
        column
        for part in ("checksums", "ours", "mine")
        for column in (_int64(f"{part}_offset"), _int64(f"{part}_size"), Column(f"{part}_sha256", "bytes", 32))
    ),
)


def encode_plan(plan: Plan) -> bytes:
    """The plan's object: four streams. Raises LayoutError for a plan that would not be read again."""
    plan.validate()
    tensors, fragments, ranks = plan.tensors, plan.fragments, plan.ranks
    blocks = {"dscheck.block_bytes": str(plan.block_bytes)}
    return _write(
        ("tensors", TENSORS, {}, [
            _texts(t.name for t in tensors),
            _texts(t.dtype for t in tensors),
            _lists([t.shape for t in tensors], np.int64),
            _text_lists([t.aliases for t in tensors]),
        ]),
        ("fragments", FRAGMENTS, blocks, [
            _ints([f.tensor for f in fragments], np.int32),
            _lists([f.region.start for f in fragments], np.int64),
            _lists([f.region.stop for f in fragments], np.int64),
            _ints([f.writer for f in fragments], np.int32),
            _ints([f.offset for f in fragments], np.int64),
            _ints([f.nbytes for f in fragments], np.int64),
            _ints([f.first_block for f in fragments], np.int64),
            _ints([f.holders for f in fragments], np.int32),
        ]),
        ("ranks", RANKS, {}, [
            _ints([r.rank for r in ranks], np.int32),
            _texts(r.host for r in ranks),
            _text_lists([[name for name, _ in r.mesh] for r in ranks]),
            _lists([[at for _, at in r.mesh] for r in ranks], np.int32),
        ]),
        ("holders", HOLDERS, {}, [_lists(plan.holders, np.int32)]),
    )  # fmt: skip


def decode_plan(data: bytes, key: str) -> Plan:
    """The plan in the object `key`. CorruptCheckpointError for any other content, with memory in its proportion."""
    try:
        tensors, fragments, ranks, holders = _read(
            data, ("tensors", TENSORS), ("fragments", FRAGMENTS), ("ranks", RANKS), ("holders", HOLDERS)
        )
        plan = Plan(
            tuple(map(TensorRow, *_columns(tensors))),
            tuple(_fragments(*_columns(fragments))),
            tuple(_ranks(*_columns(ranks))),
            tuple(_columns(holders)[0]),
            _block_bytes(fragments.schema),
        )
        plan.validate()
    except (ValueError, pa.ArrowException) as error:
        raise _corrupt(key, error) from error
    return plan


def encode_files(rows: Sequence[FileRow]) -> bytes:
    """The object `files.arrow`: one stream. Raises LayoutError for rows that would not be read again."""
    validate_files(rows)
    columns = [
        _ints([row.rank for row in rows], np.int32),
        _ints([row.size for row in rows], np.int64),
        _ints([row.blocks for row in rows], np.int64),
    ]
    for name in ("checksums", "ours", "mine"):
        parts: list[Extent] = [getattr(row, name) for row in rows]
        columns.append(_ints([part.offset for part in parts], np.int64))
        columns.append(_ints([part.size for part in parts], np.int64))
        columns.append(pa.array([bytes.fromhex(part.sha256) for part in parts], pa.binary(32)))
    return _write(("files", FILES, {}, columns))


def decode_files(data: bytes, key: str) -> tuple[FileRow, ...]:
    """The rows in the object `key`. Raises CorruptCheckpointError for every other content."""
    try:
        (batch,) = _read(data, ("files", FILES))
        rank, size, blocks, *parts = _columns(batch)
        extents = [
            [Extent(offset, size, digest.hex()) for offset, size, digest in zip(*parts[i : i + 3], strict=True)]
            for i in (0, 3, 6)
        ]
        rows = tuple(map(FileRow, rank, size, blocks, *extents))
        validate_files(rows)
    except (ValueError, pa.ArrowException) as error:
        raise _corrupt(key, error) from error
    return rows


def _fragments(
    tensor: list[int], start: list[tuple[int, ...]], stop: list[tuple[int, ...]], *others: list[int]
) -> Iterable[Fragment]:
    return map(Fragment, tensor, map(Region, start, stop), *others)


def _ranks(
    rank: list[int], host: list[str], dims: list[tuple[str, ...]], at: list[tuple[int, ...]]
) -> Iterable[RankRow]:
    meshes = (tuple(zip(names, coordinate, strict=True)) for names, coordinate in zip(dims, at, strict=True))
    return map(RankRow, rank, host, meshes)


def _block_bytes(schema: pa.Schema) -> int:
    digits = schema.metadata[b"dscheck.block_bytes"]
    if not (digits.isdigit() and len(digits) < 20):
        raise ValueError("the size of a block is no number")
    return int(digits)


def _ints(values: list[int], dtype: DTypeLike) -> pa.Array:
    return pa.array(np.array(values, dtype))


def _texts(values: Iterable[str]) -> pa.Array:
    try:
        return pa.array(values, pa.utf8())
    except UnicodeEncodeError as error:
        raise LayoutError(f"the name {error.object!r} is no Unicode text") from error


def _lists(rows: Sequence[Sequence[int]], dtype: DTypeLike) -> pa.Array:
    count = sum(map(len, rows))
    return _list_array(rows, pa.array(np.fromiter(chain.from_iterable(rows), dtype, count)))


def _text_lists(rows: Sequence[Sequence[str]]) -> pa.Array:
    return _list_array(rows, _texts(chain.from_iterable(rows)))


def _list_array(rows: Sequence[Sequence[Any]], items: pa.Array) -> pa.Array:
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(np.fromiter(map(len, rows), np.int32, len(rows)), out=offsets[1:])
    field = pa.field("item", items.type, nullable=False)
    return pa.ListArray.from_arrays(pa.array(offsets), items, type=pa.list_(field))


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


def _write(*streams: tuple[str, Sequence[Column], dict[str, str], list[pa.Array]]) -> bytes:
    sink = pa.BufferOutputStream()
    for table, columns, metadata, arrays in streams:
        schema = _schema(table, columns, metadata)
        with pa.ipc.new_stream(sink, schema, options=pa.ipc.IpcWriteOptions(compression=None)) as writer:
            writer.write_batch(pa.record_batch(arrays, schema=schema))
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _read(data: bytes, *streams: tuple[str, Sequence[Column]]) -> list[pa.RecordBatch]:
    """One valid batch a stream, in place. Raises ValueError or ArrowException."""
    batches = []
    for (begin, end), (table, columns) in zip(walk(data, [c for _, c in streams]), streams, strict=True):
        batch = pa.ipc.open_stream(pa.py_buffer(data).slice(begin, end - begin)).read_next_batch()
        metadata = {name.decode(): text.decode() for name, text in (batch.schema.metadata or {}).items()}
        expected = {"dscheck.table"} | ({"dscheck.block_bytes"} if table == "fragments" else set())
        if metadata.keys() != expected or metadata["dscheck.table"] != table:
            raise ValueError(f"the metadata of table '{table}' is {metadata}")
        if not batch.schema.equals(_schema(table, columns, metadata), check_metadata=True):
            raise ValueError(f"table '{table}' has another schema")
        batch.validate(full=True)
        batches.append(batch)
    return batches


def _columns(batch: pa.RecordBatch) -> list[list[Any]]:
    """Each column as a list: ints, strings, bytes, or tuples of them."""
    return [_values(column) for column in batch.columns]


def _values(array: pa.Array) -> list[Any]:
    if pa.types.is_integer(array.type):
        numbers: list[Any] = array.to_numpy().tolist()
        return numbers
    if not pa.types.is_list(array.type):
        plain: list[Any] = array.to_pylist()
        return plain
    items = _values(array.values)
    # Arrow may leave out the offsets of no rows.
    offsets = array.offsets.to_numpy().tolist() if len(array) else []
    return [tuple(items[begin:end]) for begin, end in pairwise(offsets)]


def _corrupt(key: str, error: Exception) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"'{key}' is damaged, or was not written by dscheck ({error}): load an earlier step, or run `dscheck verify`",
        key=key,
    )
