"""Plans and files as Arrow streams: what any Arrow reader finds in them, and that only they are read back."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dscheck.commit import put_plan
from dscheck.commit.stored import StoredPlan
from dscheck.errors import CorruptCheckpointError, LayoutError
from dscheck.layout.region import Region
from dscheck.manifest.arrow import BATCHES, decode_batch, decode_files, encode_files, encode_plan
from dscheck.manifest.files import Extent, FileRow, validate_files
from dscheck.manifest.fragments import Fragment, Fragments
from dscheck.manifest.head import BatchRules
from dscheck.manifest.messages import walk
from dscheck.manifest.place import place
from dscheck.manifest.plan import Plan, RankRow, TensorRow
from dscheck.storage.memory import MemoryStorage
from tests.manifest.plans import plans
from tests.manifest.stored import BATCH, ENCODED, HEAD, decoded_batch, decoded_head, encoded, head_of, stored
from tests.manifest.test_plan import PLAN, fragment

END = b"\xff\xff\xff\xff\0\0\0\0"
TABLES = ("tensors", "ranks", "holders", "batches", "fragments")
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


@given(plans(), st.integers(1, 5))
@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_a_plan_comes_back_as_it_was(plan: Plan, batch_rows: int) -> None:
    """format F29, F33, F46, F100"""
    found = stored(plan, batch_rows)
    assert found.whole() == plan
    assert list(found.head.file_ends) == plan.file_ends()
    assert Fragments.joined(list(found.batches())) == plan.fragments
    for number in range(len(plan.tensors)):
        assert found.fragments_of(number) == plan.fragments_of(number)
    assert encode_plan(found.whole()) == encode_plan(plan)


@given(plans(), st.integers(1, 5))
@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_a_batch_holds_whole_tensors_or_a_part_of_one(plan: Plan, batch_rows: int) -> None:
    """format F101, F102, F103"""
    directory, at = stored(plan, batch_rows).head.directory, 0
    count = Counter(plan.fragments.tensor.tolist())
    for number in range(len(directory)):
        rows = plan.fragments[at : at + int(directory.rows[number])]
        at += len(rows)
        tensors = set(rows.tensor.tolist())
        assert (min(tensors), max(tensors)) == (directory.first[number], directory.last[number])
        hull = directory.hulls.region(number)
        if len(rows) == sum(count[tensor] for tensor in tensors):
            assert hull == Region((), ())
        else:
            assert len(tensors) == 1
            bounds = zip(*(zip(row.region.start, row.region.stop, strict=True) for row in rows), strict=True)
            edges = [(min(a for a, _ in pairs), max(b for _, b in pairs)) for pairs in bounds]
            assert hull == Region(tuple(a for a, _ in edges), tuple(b for _, b in edges))
    assert at == len(plan.fragments)


def test_any_arrow_reader_finds_the_tables() -> None:
    """format F29, F30, F31, F32, F33, F100"""
    found = streams(ENCODED.data)
    assert [schema.metadata[b"dscheck.table"].decode() for schema, _ in found] == list(TABLES)
    assert [len(schema.metadata) for schema, _ in found] == [1, 1, 1, 2, 1]
    assert found[3][0].metadata[b"dscheck.block_bytes"] == b"16"
    assert [len(batches) for _, batches in found] == [1, 1, 1, 1, 1]
    expected = [
        {"name": pa.utf8(), "dtype": pa.utf8(), "shape": INT64S, "aliases": STRINGS},
        {
            "rank": pa.int32(),
            "host": pa.utf8(),
            "mesh_dims": STRINGS,
            "mesh_coordinates": INT32S,
            "end": pa.int64(),
            "blocks": pa.int64(),
        },
        {"ranks": INT32S},
        {
            "offset": pa.int64(),
            "size": pa.int64(),
            "rows": pa.int32(),
            "first": pa.int32(),
            "last": pa.int32(),
            "low": INT64S,
            "high": INT64S,
            "sha256": pa.binary(32),
        },
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
    ]
    for (schema, _), columns in zip(found, expected, strict=True):
        assert schema.equals(pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()]))
    tensors, ranks, holders, batches, fragments = (batch.to_pylist() for _, (batch,) in found)
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
    place = {"mesh_dims": ["dp"], "mesh_coordinates": [0]}
    assert ranks[0] == {"rank": 0, "host": "h0", **place, "end": 24, "blocks": 2}
    assert holders == [{"ranks": [0]}, {"ranks": [1]}, {"ranks": [0, 1]}]
    digest = hashlib.sha256(BATCH).digest()
    bounds = {"offset": 0, "size": len(BATCH), "low": [], "high": [], "sha256": digest}
    assert batches == [{**bounds, "rows": 3, "first": 0, "last": 1}]


def test_each_stream_ends_with_its_marker() -> None:
    """format F29, F30"""
    for data, decode in ((HEAD, decoded_head), (BATCH, decoded_batch)):
        assert data.endswith(END)
        with pytest.raises(CorruptCheckpointError):
            decode(data[: -len(END)])
        for more in (b"\0", b"\0" * 8, END, data):
            with pytest.raises(CorruptCheckpointError, match=r"'plans/1-x.* is damaged"):
                decode(data + more, "plans/1-x")


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_a_compressed_head_is_refused(codec: str) -> None:
    """format F31"""
    data = rewrite(HEAD, "batches", lambda batch: batch, compression=codec)
    with pytest.raises(CorruptCheckpointError, match="compressed"):
        decoded_head(data)


@pytest.mark.parametrize("codec", ["lz4", None])
def test_a_batch_of_another_compression_is_refused(codec: str | None) -> None:
    """format F104"""
    with pytest.raises(CorruptCheckpointError, match="not compressed"):
        decoded_batch(rewrite(BATCH, "fragments", lambda batch: batch, compression=codec))


def test_a_batch_that_any_arrow_writer_compressed_is_read() -> None:
    """format F104"""
    for level in (1, 5, 19):
        codec = pa.Codec("zstd", level)
        assert decoded_batch(rewrite(BATCH, "fragments", lambda batch: batch, compression=codec)) == PLAN.fragments


def test_other_metadata_versions_are_refused() -> None:
    """format F30"""
    data = rewrite(HEAD, "holders", lambda batch: batch, metadata_version=pa.ipc.MetadataVersion.V4)
    with pytest.raises(CorruptCheckpointError, match="another kind"):
        decoded_head(data)


def test_a_second_batch_is_refused() -> None:
    """format F30"""
    sink = pa.BufferOutputStream()
    for schema, (batch,) in streams(HEAD):
        with pa.ipc.new_stream(sink, schema) as writer:
            writer.write_batch(batch)
            writer.write_batch(batch.slice(0, 0))
    with pytest.raises(CorruptCheckpointError, match="does not end after its one batch"):
        decoded_head(sink.getvalue().to_pybytes())


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
}


@pytest.mark.parametrize("change", OTHER_SCHEMAS.values(), ids=OTHER_SCHEMAS)
def test_another_schema_is_refused(change: Callable[[pa.RecordBatch], pa.RecordBatch]) -> None:
    """format F31, F32, F33"""
    with pytest.raises(CorruptCheckpointError, match="'k batch 0' is damaged"):
        decoded_batch(rewrite(BATCH, "fragments", change, compression="zstd"))


OTHER_BLOCKS: dict[str, Callable[[pa.RecordBatch], pa.RecordBatch]] = {
    "block -1": lambda b: b.replace_schema_metadata({**b.schema.metadata, b"dscheck.block_bytes": b"-1"}),
    "block 1_6": lambda b: b.replace_schema_metadata({**b.schema.metadata, b"dscheck.block_bytes": b"1_6"}),
    "block 1e3": lambda b: b.replace_schema_metadata({**b.schema.metadata, b"dscheck.block_bytes": b"1e3"}),
    "block huge": lambda b: b.replace_schema_metadata({**b.schema.metadata, b"dscheck.block_bytes": b"9" * 19}),
}


@pytest.mark.parametrize("change", OTHER_BLOCKS.values(), ids=OTHER_BLOCKS)
def test_another_size_of_a_block_is_refused(change: Callable[[pa.RecordBatch], pa.RecordBatch]) -> None:
    """format F32, F52"""
    with pytest.raises(CorruptCheckpointError, match="'k' is damaged"):
        decoded_head(rewrite(HEAD, "batches", change))


def changed_rows(name: str, values: list[Any]) -> Callable[[pa.RecordBatch], pa.RecordBatch]:
    def change(batch: pa.RecordBatch) -> pa.RecordBatch:
        at = batch.schema.get_field_index(name)
        columns = [*batch.columns[:at], pa.array(values, batch.schema.field(at).type), *batch.columns[at + 1 :]]
        return pa.record_batch(columns, schema=batch.schema)

    return change


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("offset", [1]),
        ("size", [0]),
        ("size", [-8]),
        ("rows", [0]),
        ("rows", [(1 << 16) + 1]),
        ("first", [-1]),
        ("first", [2]),
        ("last", [3]),
        ("low", [[0]]),
    ],
)
def test_a_directory_that_contradicts_itself_is_refused(name: str, values: list[Any]) -> None:
    """format F100, F101"""
    with pytest.raises(CorruptCheckpointError, match="'k' is damaged"):
        decoded_head(rewrite(HEAD, "batches", changed_rows(name, values)))


SPLIT = encoded(PLAN, 1)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("first", [0, 1, 1]),
        ("last", [0, 1, 1]),
        ("low", [[0, 0], [], []]),
        ("high", [[2, 3], [4, 4], []]),
        ("low", [[0, 0], [4, 0], []]),
        ("low", [[0, 0], [-1, 0], []]),
        ("low", [[0, 0], [2], []]),
    ],
)
def test_the_boxes_around_parts_of_a_tensor_lie_in_it(name: str, values: list[Any]) -> None:
    """format F102, F103"""
    decoded_head(head_of(SPLIT))
    with pytest.raises(CorruptCheckpointError, match="'k' is damaged"):
        decoded_head(rewrite(head_of(SPLIT), "batches", changed_rows(name, values)))


@pytest.mark.parametrize(
    ("table", "name", "values", "match"),
    [
        ("batches", "rows", [2], "a batch of 3 rows, 2 expected"),
        ("batches", "first", [1], "first and last tensor of batch 0"),
        ("ranks", "end", [23, 72], "behind the end of its data file"),
        ("ranks", "blocks", [2, 2], "behind the end of its data file"),
    ],
)
def test_a_batch_that_is_not_what_the_head_says_is_refused(
    table: str, name: str, values: list[Any], match: str
) -> None:
    """format F101, F105"""
    head = decoded_head(rewrite(HEAD, table, changed_rows(name, values)))
    rules = BatchRules(head)
    with pytest.raises((CorruptCheckpointError, LayoutError), match=match):
        rules.check_batch(0, decode_batch(BATCH, 0, head, rules, "k"))


def test_a_box_that_is_not_that_around_the_rows_is_refused() -> None:
    """format F103"""
    head = decoded_head(rewrite(head_of(SPLIT), "batches", changed_rows("high", [[3, 3], [4, 3], []])))
    first = SPLIT.data[SPLIT.head.size :][: int(head.directory.size[0])]
    rules = BatchRules(head)
    with pytest.raises(LayoutError, match=r"the box around the fragments of batch 0 is not \[0:3, 0:3\]"):
        rules.check_batch(0, decode_batch(first, 0, head, rules, "k"))


def test_nulls_are_refused() -> None:
    """format F31"""

    def with_null(batch: pa.RecordBatch) -> pa.RecordBatch:
        return pa.record_batch(
            [pa.array([None, *batch.columns[0].to_pylist()[1:]], pa.int32()), *batch.columns[1:]], schema=batch.schema
        )

    with pytest.raises(CorruptCheckpointError, match="without nulls"):
        decoded_batch(rewrite(BATCH, "fragments", with_null, compression="zstd"))


def test_a_table_of_more_rows_than_an_int32_counts_is_refused() -> None:
    """format F34"""
    begin, end = walk_bounds(HEAD)[2]
    refusals = []
    for slot in range(begin, end, 8):
        if HEAD[slot : slot + 8] == struct.pack("<q", len(PLAN.holders)):
            with pytest.raises(CorruptCheckpointError) as caught:
                decoded_head(HEAD[:slot] + struct.pack("<q", 2**31) + HEAD[slot + 8 :])
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
    bounds = walk_bounds(ENCODED.data)
    assert all(a[1] == b[0] for a, b in pairwise(bounds))
    begin, end = bounds[3]
    assert walk(HEAD[begin:end], [BATCHES]) == [(0, end - begin)]
    assert bounds[4] == (len(HEAD), len(ENCODED.data))


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
    storage = MemoryStorage()
    digest = put_plan(storage, 1, encode_plan(plan))
    written = time.process_time()
    assert StoredPlan(storage, 1, digest).whole() == plan
    # 0.1 s and 0.1 s on two shared cores.
    assert written - begun < 1
    assert time.process_time() - written < 1


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
    validate_files(rows, ends)
    with pytest.raises(LayoutError, match="the plan has 2 ranks"):
        validate_files(rows[:1], ends)
    with pytest.raises(LayoutError, match="checksums at 72; by the plan 3 at 136"):
        validate_files(rows, fragment(2, offset=128).file_ends())
    moved = dataclasses.replace(PLAN, fragments=PLAN.fragments[:2]).file_ends()
    with pytest.raises(LayoutError, match="data file 1 has 3 blocks with checksums at 72; by the plan 2 at 24"):
        validate_files(rows, moved)
