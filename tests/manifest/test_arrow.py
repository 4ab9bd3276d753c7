"""Plans and files as Arrow streams: what any Arrow reader finds in them, and that only they are read back."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings

from dscheck.errors import CorruptCheckpointError, LayoutError
from dscheck.layout.region import Region
from dscheck.manifest.arrow import FRAGMENTS, decode_files, decode_plan, encode_files, encode_plan
from dscheck.manifest.files import Extent, FileRow, validate_files
from dscheck.manifest.fragments import Fragment, Fragments
from dscheck.manifest.messages import walk
from dscheck.manifest.place import place
from dscheck.manifest.plan import Plan, RankRow, TensorRow
from tests.manifest.plans import plans
from tests.manifest.test_plan import PLAN

END = b"\xff\xff\xff\xff\0\0\0\0"
TABLES = ("tensors", "fragments", "ranks", "holders")
STRINGS = pa.list_(pa.field("item", pa.utf8(), nullable=False))
INT64S = pa.list_(pa.field("item", pa.int64(), nullable=False))
INT32S = pa.list_(pa.field("item", pa.int32(), nullable=False))


def file_rows(blocks: tuple[int, ...] = (2, 3, 0)) -> tuple[FileRow, ...]:
    rows = []
    for rank, count in enumerate(blocks):
        extents, at = [], 8 * rank
        for size in (4 * count, 100, 50):
            extents.append(Extent(at, size, hashlib.sha256(bytes(rank)).hexdigest()))
            at += size
        rows.append(FileRow(rank, at, count, *extents))
    return tuple(rows)


def streams(data: bytes) -> list[tuple[pa.Schema, list[pa.RecordBatch]]]:
    source, found = pa.BufferReader(data), []
    while source.tell() < len(data):
        reader = pa.ipc.open_stream(source)
        found.append((reader.schema, list(reader)))
    return found


def rewrite(data: bytes, table: str, change: Callable[[pa.RecordBatch], pa.RecordBatch], **options: Any) -> bytes:
    """`data` with the batch of one stream replaced, written by pyarrow with other options."""
    sink = pa.BufferOutputStream()
    for schema, (batch,) in streams(data):
        hit = schema.metadata[b"dscheck.table"].decode() == table
        batch = change(batch) if hit else batch
        write_options = pa.ipc.IpcWriteOptions(**(options if hit else {}))
        with pa.ipc.new_stream(sink, batch.schema, options=write_options) as writer:
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


@given(plans())
@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_a_plan_comes_back_as_it_was(plan: Plan) -> None:
    """format F29, F33"""
    data = encode_plan(plan)
    assert decode_plan(data, "k") == plan
    assert encode_plan(decode_plan(data, "k")) == data


def test_any_arrow_reader_finds_the_four_tables() -> None:
    """format F29, F30, F31, F32, F33"""
    found = streams(encode_plan(PLAN))
    assert [schema.metadata[b"dscheck.table"].decode() for schema, _ in found] == list(TABLES)
    assert [len(schema.metadata) for schema, _ in found] == [1, 2, 1, 1]
    assert found[1][0].metadata[b"dscheck.block_bytes"] == b"16"
    assert [len(batches) for _, batches in found] == [1, 1, 1, 1]
    expected = [
        {"name": pa.utf8(), "dtype": pa.utf8(), "shape": INT64S, "aliases": STRINGS},
        {
            "tensor": pa.int32(),
            "start": INT64S,
            "stop": INT64S,
            "writer": pa.int32(),
            "offset": pa.int64(),
            "nbytes": pa.int64(),
            "first_block": pa.int64(),
            "holders": pa.int32(),
        },
        {"rank": pa.int32(), "host": pa.utf8(), "mesh_dims": STRINGS, "mesh_coordinates": INT32S},
        {"ranks": INT32S},
    ]
    for (schema, _), columns in zip(found, expected, strict=True):
        assert schema.equals(pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()]))
    tensors, fragments, ranks, holders = (batch.to_pylist() for _, (batch,) in found)
    assert tensors[0] == {"name": "a", "dtype": "float32", "shape": [4, 3], "aliases": ["z"]}
    assert fragments[1] == {
        "tensor": 0,
        "start": [2, 0],
        "stop": [4, 3],
        "writer": 1,
        "offset": 0,
        "nbytes": 24,
        "first_block": 0,
        "holders": 1,
    }
    assert ranks[0] == {"rank": 0, "host": "h0", "mesh_dims": ["dp"], "mesh_coordinates": [0]}
    assert holders == [{"ranks": [0]}, {"ranks": [1]}, {"ranks": [0, 1]}]


def test_each_stream_ends_with_its_marker() -> None:
    """format F29, F30"""
    data = encode_plan(PLAN)
    assert data.endswith(END)
    with pytest.raises(CorruptCheckpointError):
        decode_plan(data[: -len(END)], "k")
    for more in (b"\0", b"\0" * 8, END, data):
        with pytest.raises(CorruptCheckpointError, match="'plans/1-x' is damaged"):
            decode_plan(data + more, "plans/1-x")


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_compressed_streams_are_refused(codec: str) -> None:
    """format F31"""
    data = rewrite(encode_plan(PLAN), "fragments", lambda batch: batch, compression=codec)
    with pytest.raises(CorruptCheckpointError, match="compressed"):
        decode_plan(data, "k")


def test_other_metadata_versions_are_refused() -> None:
    """format F30"""
    data = rewrite(encode_plan(PLAN), "holders", lambda batch: batch, metadata_version=pa.ipc.MetadataVersion.V4)
    with pytest.raises(CorruptCheckpointError, match="another kind"):
        decode_plan(data, "k")


def test_a_second_batch_is_refused() -> None:
    """format F30"""
    sink = pa.BufferOutputStream()
    for schema, (batch,) in streams(encode_plan(PLAN)):
        with pa.ipc.new_stream(sink, schema) as writer:
            writer.write_batch(batch)
            writer.write_batch(batch.slice(0, 0))
    with pytest.raises(CorruptCheckpointError, match="does not end after its one batch"):
        decode_plan(sink.getvalue().to_pybytes(), "k")


def with_schema(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    arrays = [column.cast(field.type) for column, field in zip(batch.columns, schema, strict=True)]
    return pa.record_batch(arrays, schema=schema)


def replaced(batch: pa.RecordBatch, at: int, field: pa.Field) -> pa.RecordBatch:
    return with_schema(batch, batch.schema.set(at, field))


OTHER_SCHEMAS: dict[str, Callable[[pa.RecordBatch], pa.RecordBatch]] = {
    "nullable": lambda b: replaced(b, 0, b.schema.field(0).with_nullable(True)),
    "nullable item": lambda b: replaced(b, 1, pa.field("start", pa.list_(pa.int64()), nullable=False)),
    "wider": lambda b: replaced(b, 0, pa.field("tensor", pa.int64(), nullable=False)),
    "unsigned": lambda b: replaced(b, 0, pa.field("tensor", pa.uint32(), nullable=False)),
    "float": lambda b: replaced(b, 4, pa.field("offset", pa.float64(), nullable=False)),
    "renamed": lambda b: replaced(b, 4, pa.field("Offset", pa.int64(), nullable=False)),
    "large list": lambda b: replaced(
        b, 1, pa.field("start", pa.large_list(pa.field("item", pa.int64(), nullable=False)), nullable=False)
    ),
    "field metadata": lambda b: replaced(b, 0, b.schema.field(0).with_metadata({"ARROW:extension:name": "x"})),
    "dictionary": lambda b: pa.record_batch(
        [b.columns[0].dictionary_encode(), *b.columns[1:]],
        schema=b.schema.set(0, pa.field("tensor", pa.dictionary(pa.int32(), pa.int32()), nullable=False)),
    ),
    "one less": lambda b: b.select(b.schema.names[:-1]),
    "one more": lambda b: b.append_column(pa.field("more", pa.int32(), nullable=False), b.columns[0]),
    "swapped": lambda b: b.select([*b.schema.names[1:], b.schema.names[0]]),
    "other table": lambda b: b.replace_schema_metadata({**b.schema.metadata, b"dscheck.table": b"tensors"}),
    "more metadata": lambda b: b.replace_schema_metadata({**b.schema.metadata, b"pandas": b"{}"}),
    "no metadata": lambda b: b.replace_schema_metadata(None),
    "block -1": lambda b: b.replace_schema_metadata({**b.schema.metadata, b"dscheck.block_bytes": b"-1"}),
    "block 1_6": lambda b: b.replace_schema_metadata({**b.schema.metadata, b"dscheck.block_bytes": b"1_6"}),
    "block 1e3": lambda b: b.replace_schema_metadata({**b.schema.metadata, b"dscheck.block_bytes": b"1e3"}),
    "block huge": lambda b: b.replace_schema_metadata({**b.schema.metadata, b"dscheck.block_bytes": b"9" * 19}),
}


@pytest.mark.parametrize("change", OTHER_SCHEMAS.values(), ids=OTHER_SCHEMAS)
def test_another_schema_is_refused(change: Callable[[pa.RecordBatch], pa.RecordBatch]) -> None:
    """format F31, F32, F33, F52"""
    with pytest.raises(CorruptCheckpointError, match="'k' is damaged"):
        decode_plan(rewrite(encode_plan(PLAN), "fragments", change), "k")


def test_nulls_are_refused() -> None:
    """format F31"""

    def with_null(batch: pa.RecordBatch) -> pa.RecordBatch:
        return pa.record_batch(
            [pa.array([None, *batch.columns[0].to_pylist()[1:]], pa.int32()), *batch.columns[1:]], schema=batch.schema
        )

    with pytest.raises(CorruptCheckpointError, match="without nulls"):
        decode_plan(rewrite(encode_plan(PLAN), "fragments", with_null), "k")


def test_a_table_of_more_rows_than_an_int32_counts_is_refused() -> None:
    """format F34"""
    data = encode_plan(PLAN)
    begin, end = walk_bounds(data)[1]
    refusals = []
    for slot in range(begin, end, 8):
        if data[slot : slot + 8] == struct.pack("<q", len(PLAN.fragments)):
            with pytest.raises(CorruptCheckpointError) as caught:
                decode_plan(data[:slot] + struct.pack("<q", 2**31) + data[slot + 8 :], "k")
            refusals.append(str(caught.value))
    assert sum("a batch of 2147483648 rows" in refusal for refusal in refusals) == 1


def walk_bounds(data: bytes) -> list[tuple[int, int]]:
    found, source = [], pa.BufferReader(data)
    while source.tell() < len(data):
        begin = source.tell()
        list(pa.ipc.open_stream(source))
        found.append((begin, source.tell()))
    return found


def test_the_walk_and_arrow_agree_on_where_streams_end() -> None:
    data = encode_plan(PLAN)
    bounds = walk_bounds(data)
    assert all(a[1] == b[0] for a, b in pairwise(bounds))
    begin, end = bounds[1]
    assert walk(data[begin:end], [FRAGMENTS]) == [(0, end - begin)]


@pytest.mark.parametrize("plan", [dataclasses.replace(PLAN, block_bytes=0), dataclasses.replace(PLAN, ranks=())])
def test_a_plan_that_would_not_be_read_is_not_written(plan: Plan) -> None:
    with pytest.raises(LayoutError):
        encode_plan(plan)


def test_a_name_that_is_no_text_is_not_written() -> None:
    tensors = (dataclasses.replace(PLAN.tensors[0], name="a\ud800"), *PLAN.tensors[1:])
    with pytest.raises(LayoutError, match="no Unicode text"):
        encode_plan(dataclasses.replace(PLAN, tensors=tensors))


def test_a_hundred_thousand_fragments_take_less_than_a_second() -> None:
    tensors, ranks = 1000, 100
    offsets, first_blocks, _ = place([6400] * tensors, 1 << 18)
    plan = Plan(
        tuple(TensorRow(f"layers.{i:04}.w", "bfloat16", (5000, 64)) for i in range(tensors)),
        Fragments.of(
            Fragment(t, Region((50 * r, 0), (50 * r + 50, 64)), r, offsets[t], 6400, first_blocks[t], r)
            for t in range(tensors)
            for r in range(ranks)
        ),
        tuple(RankRow(r, f"host{r // 8}") for r in range(ranks)),
        tuple((r,) for r in range(ranks)),
        1 << 18,
    )
    begun = time.process_time()
    data = encode_plan(plan)
    encoded = time.process_time()
    decode_plan(data, "k")
    # 0.2 s and 0.5 s on two shared cores.
    assert encoded - begun < 1
    assert time.process_time() - encoded < 2


def test_files_come_back_as_they_were() -> None:
    """format F66, F67"""
    for rows in ((), file_rows(), file_rows((0,))):
        assert decode_files(encode_files(rows), "k") == rows


def test_any_arrow_reader_finds_the_files() -> None:
    """format F66, F67"""
    ((schema, (batch,)),) = streams(encode_files(file_rows()))
    assert schema.metadata == {b"dscheck.table": b"files"}
    kinds = {"rank": pa.int32(), "size": pa.int64(), "blocks": pa.int64()}
    for part in ("checksums", "ours", "mine"):
        kinds |= {f"{part}_offset": pa.int64(), f"{part}_size": pa.int64(), f"{part}_sha256": pa.binary(32)}
    assert schema.equals(pa.schema([pa.field(name, kind, nullable=False) for name, kind in kinds.items()]))
    assert batch.to_pylist()[1]["ours_sha256"] == hashlib.sha256(b"\0").digest()
    assert batch.to_pylist()[1]["size"] == 8 + 12 + 150


BAD_ROWS = {
    "another rank": {"rank": 2},
    "a longer file": {"size": 171},
    "more blocks": {"blocks": 4},
    "unaligned checksums": {"checksums": Extent(4, 12, "0" * 64), "ours": Extent(16, 104, "0" * 64)},
    "a gap": {"ours": Extent(21, 99, "0" * 64)},
    "an overlap": {"mine": Extent(119, 51, "0" * 64)},
    "a negative size": {"ours": Extent(20, -1, "0" * 64), "mine": Extent(19, 151, "0" * 64)},
    "no digest": {"ours": Extent(20, 100, "0" * 63)},
}


@pytest.mark.parametrize("fields", BAD_ROWS.values(), ids=BAD_ROWS)
def test_files_with_gaps_overlaps_or_miscounts_are_refused(fields: dict[str, Any]) -> None:
    """format F54, F61, F64, F67"""
    rows = list(file_rows())
    rows[1] = dataclasses.replace(rows[1], **fields)
    with pytest.raises(LayoutError):
        encode_files(rows)


def test_files_of_another_plan_are_refused() -> None:
    """format F54, F60, F61, F67"""
    ends = PLAN.file_ends()
    rows = []
    for rank, (end, blocks) in enumerate(ends):
        extents, at = [], end
        for size in (4 * blocks, 10, 10):
            extents.append(Extent(at, size, "0" * 64))
            at += size
        rows.append(FileRow(rank, at, blocks, *extents))
    validate_files(rows, PLAN)
    with pytest.raises(LayoutError, match="the plan has 2 ranks"):
        validate_files(rows[:1], PLAN)
    later = dataclasses.replace(PLAN.fragments[2], offset=128)
    with pytest.raises(LayoutError, match="checksums at 72; by the plan 3 at 136"):
        validate_files(rows, dataclasses.replace(PLAN, fragments=Fragments.of([*PLAN.fragments[:2], later])))
    moved = dataclasses.replace(PLAN, fragments=PLAN.fragments[:2])
    with pytest.raises(LayoutError, match="data file 1 has 3 blocks with checksums at 72; by the plan 2 at 24"):
        validate_files(rows, moved)
