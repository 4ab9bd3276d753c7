"""Plans and `files.arrow` as Arrow IPC streams, back to back. Source: docs/format.md.

Callers have compared size and SHA-256 with the record before they decode. What is decoded is still a stranger's: see
messages.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

from dscheck.errors import CorruptCheckpointError
from dscheck.layout.boxes import Boxes
from dscheck.manifest.files import Extent, FileRow, validate_files
from dscheck.manifest.fragments import Fragments
from dscheck.manifest.messages import Column
from dscheck.manifest.plan import Plan, RankRow, TensorRow
from dscheck.manifest.tables import columns, ints, lists, offsets, ragged, read, text_lists, texts, write


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
    return write(
        ("tensors", TENSORS, {}, [
            texts(t.name for t in tensors),
            texts(t.dtype for t in tensors),
            lists([t.shape for t in tensors], np.int64),
            text_lists([t.aliases for t in tensors]),
        ]),
        ("fragments", FRAGMENTS, blocks, [
            pa.array(fragments.tensor),
            ragged(fragments.boxes.at, fragments.boxes.start),
            ragged(fragments.boxes.at, fragments.boxes.stop),
            pa.array(fragments.writer),
            pa.array(fragments.offset),
            pa.array(fragments.nbytes),
            pa.array(fragments.first_block),
            pa.array(fragments.holders),
        ]),
        ("ranks", RANKS, {}, [
            ints([r.rank for r in ranks], np.int32),
            texts(r.host for r in ranks),
            text_lists([[name for name, _ in r.mesh] for r in ranks]),
            lists([[at for _, at in r.mesh] for r in ranks], np.int32),
        ]),
        ("holders", HOLDERS, {}, [lists(plan.holders, np.int32)]),
    )  # fmt: skip


def decode_plan(data: bytes, key: str) -> Plan:
    """The plan in the object `key`. CorruptCheckpointError for any other content, with memory in its proportion."""
    try:
        tensors, fragments, ranks, holders = read(
            data, ("tensors", TENSORS), ("fragments", FRAGMENTS), ("ranks", RANKS), ("holders", HOLDERS)
        )
        plan = Plan(
            tuple(map(TensorRow, *columns(tensors))),
            _fragments(fragments),
            tuple(_ranks(*columns(ranks))),
            tuple(columns(holders)[0]),
            _block_bytes(fragments.schema),
        )
        plan.validate()
    except (ValueError, OSError, pa.ArrowException) as error:
        raise _corrupt(key, error) from error
    return plan


def encode_files(rows: Sequence[FileRow]) -> bytes:
    """The object `files.arrow`: one stream. Raises LayoutError for rows that would not be read again."""
    validate_files(rows)
    values = [
        ints([row.rank for row in rows], np.int32),
        ints([row.size for row in rows], np.int64),
        ints([row.blocks for row in rows], np.int64),
    ]
    for name in ("checksums", "ours", "mine"):
        parts: list[Extent] = [getattr(row, name) for row in rows]
        values.append(ints([part.offset for part in parts], np.int64))
        values.append(ints([part.size for part in parts], np.int64))
        values.append(pa.array([bytes.fromhex(part.sha256) for part in parts], pa.binary(32)))
    return write(("files", FILES, {}, values))


def decode_files(data: bytes, key: str) -> tuple[FileRow, ...]:
    """The rows in the object `key`. Raises CorruptCheckpointError for every other content."""
    try:
        (batch,) = read(data, ("files", FILES))
        rank, size, blocks, *parts = columns(batch)
        extents = [
            [Extent(offset, size, digest.hex()) for offset, size, digest in zip(*parts[i : i + 3], strict=True)]
            for i in (0, 3, 6)
        ]
        rows = tuple(map(FileRow, rank, size, blocks, *extents))
        validate_files(rows)
    except (ValueError, OSError, pa.ArrowException) as error:
        raise _corrupt(key, error) from error
    return rows


def _fragments(batch: pa.RecordBatch) -> Fragments:
    tensor, start, stop, *numbers = batch.columns
    at = offsets(start)
    if not np.array_equal(at, offsets(stop)):
        raise ValueError("a fragment has not as many starts as stops")
    boxes = Boxes(at, start.values.to_numpy(), stop.values.to_numpy())
    return Fragments(tensor.to_numpy(), boxes, *(column.to_numpy() for column in numbers))


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


def _corrupt(key: str, error: Exception) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"'{key}' is damaged, or was not written by dscheck ({error}): load an earlier step, or run `dscheck verify`",
        key=key,
    )
