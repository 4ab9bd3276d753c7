"""Plans and `files.arrow` as Arrow IPC streams, back to back. Source: docs/format.md.

Callers have compared size and SHA-256 with the record before they decode. What is decoded is still a stranger's: see
messages.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from dscheck.errors import CorruptCheckpointError
from dscheck.layout.boxes import Boxes
from dscheck.layout.region import Region
from dscheck.manifest.files import Extent, FileRow, validate_files
from dscheck.manifest.fragments import Fragments
from dscheck.manifest.head import BATCH_ROWS, BatchRules, Directory, Head, cut_into_batches
from dscheck.manifest.messages import Column
from dscheck.manifest.plan import Plan, RankRow, TensorRow
from dscheck.manifest.record import Digest
from dscheck.manifest.tables import (
    array,
    as_numpy,
    columns,
    digests,
    ints,
    lists,
    offsets,
    ragged,
    read,
    read_packed,
    text_lists,
    texts,
    write,
    write_packed,
)


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
    _int64("end"),
    _int64("blocks"),
)
HOLDERS = (_list("ranks", _int32("item")),)
BATCHES = (
    _int64("offset"),
    _int64("size"),
    _int32("rows"),
    _int32("first"),
    _int32("last"),
    _list("low", _int64("item")),
    _list("high", _int64("item")),
    Column("sha256", "bytes", 32),
)
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


@dataclass(frozen=True, slots=True)
class EncodedPlan:
    """The object of a plan, and the digest of its head, which says the digests of all batches behind it."""

    data: bytes
    head: Digest


def encode_plan(plan: Plan) -> EncodedPlan:
    """Raises LayoutError for a plan that would not be read again."""
    plan.validate()
    cuts = list(cut_into_batches(plan.fragments.tensor, BATCH_ROWS))
    batches = [_encode_batch(plan.fragments[begin:end]) for begin, end in cuts]
    head = _encode_head(plan, _directory(plan.fragments, cuts, batches))
    return EncodedPlan(b"".join((head, *batches)), Digest(len(head), hashlib.sha256(head).hexdigest()))


def _encode_batch(rows: Fragments) -> bytes:
    arrays = [
        array(rows.tensor),
        ragged(rows.boxes.at, rows.boxes.start),
        ragged(rows.boxes.at, rows.boxes.stop),
        array(rows.writer),
        array(rows.offset),
        array(rows.nbytes),
        array(rows.first_block),
        array(rows.holders),
    ]
    return write_packed("fragments", FRAGMENTS, arrays)


def _directory(rows: Fragments, cuts: Sequence[tuple[int, int]], batches: Sequence[bytes]) -> Directory:
    begin, end = np.array(cuts, np.int64).reshape(-1, 2).T
    first, last = rows.tensor[begin].astype(np.int64), rows.tensor[end - 1].astype(np.int64)
    size = np.array(list(map(len, batches)), np.int64)
    split = np.zeros(len(cuts), np.bool_)
    split[1:] = first[1:] == last[:-1]
    split[:-1] |= split[1:]
    hulls = [_hull(rows.boxes.part(*cut)) if parted else None for cut, parted in zip(cuts, split.tolist(), strict=True)]
    boxes = Boxes.of([hull or Region((), ()) for hull in hulls])
    digests = tuple(hashlib.sha256(batch).digest() for batch in batches)
    return Directory(np.cumsum(size) - size, size, end - begin, first, last, boxes, digests)


def _hull(boxes: Boxes) -> Region:
    start, stop = boxes.matrices(int(boxes.ndim[0]))
    return Region(tuple(start.min(axis=0).tolist()), tuple(stop.max(axis=0).tolist()))


def _encode_head(plan: Plan, directory: Directory) -> bytes:
    tensors, ranks = plan.tensors, plan.ranks
    ends = plan.file_ends()
    return write(
        ("tensors", TENSORS, {}, [
            texts(t.name for t in tensors),
            texts(t.dtype for t in tensors),
            lists([t.shape for t in tensors], np.int64),
            text_lists([t.aliases for t in tensors]),
        ]),
        ("ranks", RANKS, {}, [
            ints([r.rank for r in ranks], np.int32),
            texts(r.host for r in ranks),
            text_lists([[name for name, _ in r.mesh] for r in ranks]),
            lists([[at for _, at in r.mesh] for r in ranks], np.int32),
            ints([end for end, _ in ends], np.int64),
            ints([blocks for _, blocks in ends], np.int64),
        ]),
        ("holders", HOLDERS, {}, [lists(plan.holders, np.int32)]),
        ("batches", BATCHES, {"dscheck.block_bytes": str(plan.block_bytes)}, [
            array(directory.offset),
            array(directory.size),
            array(directory.rows.astype(np.int32)),
            array(directory.first.astype(np.int32)),
            array(directory.last.astype(np.int32)),
            ragged(directory.hulls.at, directory.hulls.start),
            ragged(directory.hulls.at, directory.hulls.stop),
            digests(directory.sha256),
        ]),
    )  # fmt: skip


def decode_head(data: bytes, key: str) -> Head:
    """The head in the object `key`. CorruptCheckpointError for any other content, with memory in its proportion."""
    with refusing(key):
        tensors, ranks, holders, batches = read(
            data, ("tensors", TENSORS), ("ranks", RANKS), ("holders", HOLDERS), ("batches", BATCHES)
        )
        *names, ends, blocks = columns(ranks)
        head = Head(
            tuple(map(TensorRow, *columns(tensors))),
            tuple(_ranks(*names)),
            tuple(columns(holders)[0]),
            tuple(zip(ends, blocks, strict=True)),
            _decode_directory(batches),
            _block_bytes(batches.schema),
        )
        head.validate()
    return head


def _decode_directory(batch: pa.RecordBatch) -> Directory:
    *numbers, low, high, sha256 = batch.columns
    offset, size, rows, first, last = (as_numpy(column).astype(np.int64) for column in numbers)
    at = offsets(low)
    if not np.array_equal(at, offsets(high)):
        raise ValueError("a box has not as many starts as stops")
    hulls = Boxes(at, as_numpy(low.values), as_numpy(high.values))
    return Directory(offset, size, rows, first, last, hulls, tuple(sha256.to_pylist()))


def decode_batch(data: bytes, number: int, head: Head, rules: BatchRules, key: str) -> Fragments:
    """The fragments in batch `number` of the object `key`, as many as the head says; its digest has been compared.

    Raises as decode_head. Of each row it is still to be checked whether it agrees with the head.
    """
    with refusing(f"{key} batch {number}"):
        rows = int(head.directory.rows[number])
        tensor, start, stop, *numbers = read_packed(data, "fragments", FRAGMENTS, rows)
        if not np.array_equal(start[0], stop[0]):
            raise ValueError("a fragment has not as many starts as stops")
        boxes = Boxes(start[0].astype(np.int64), start[1], stop[1])
        fragments = Fragments(tensor[0], boxes, *(column[0] for column in numbers))
        rules.check_bounds(number, fragments)
    return fragments


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
        values.append(digests([bytes.fromhex(part.sha256) for part in parts]))
    return write(("files", FILES, {}, values))


def decode_files(data: bytes, key: str) -> tuple[FileRow, ...]:
    """The rows in the object `key`. Raises CorruptCheckpointError for every other content."""
    with refusing(key):
        (batch,) = read(data, ("files", FILES))
        rank, size, blocks, *parts = columns(batch)
        extents = [
            [Extent(offset, size, digest.hex()) for offset, size, digest in zip(*parts[i : i + 3], strict=True)]
            for i in (0, 3, 6)
        ]
        rows = tuple(map(FileRow, rank, size, blocks, *extents))
        validate_files(rows)
    return rows


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


@contextmanager
def refusing(key: str) -> Iterator[None]:
    """What is wrong with the content of the object `key` becomes a CorruptCheckpointError."""
    try:
        yield
    except (ValueError, OSError, pa.ArrowException) as error:
        raise CorruptCheckpointError(
            f"'{key}' is damaged, or was not written by dscheck ({error}): load an earlier step, or run "
            "`dscheck verify`",
            key=key,
        ) from error
