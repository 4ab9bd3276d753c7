"""Checkpoints for tests, written with the manifest room alone: no storage, no commit, no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dscheck.layout.region import Region
from dscheck.manifest.arrow import encode_files, encode_plan
from dscheck.manifest.dtypes import ITEMSIZE
from dscheck.manifest.files import Extent, FileRow
from dscheck.manifest.fragments import Fragment, Fragments
from dscheck.manifest.keys import data_key, files_key, plan_key, record_key, term_key
from dscheck.manifest.objects import encode_object, encode_objects
from dscheck.manifest.place import CHECKSUM_ALIGNMENT, align, block_count, place
from dscheck.manifest.plan import Plan, RankRow, TensorRow
from dscheck.manifest.record import Counts, Digest, Record, Term
from dscheck.native import crc32c

BLOCK = 256


@dataclass
class Whole:
    """A tensor with its content: `array` of elements, or of raw ones ("V2") for a dtype that NumPy has not."""

    dtype: str
    array: np.ndarray
    aliases: tuple[str, ...] = ()


@dataclass
class Step:
    """What a sample step holds. Each tensor is cut along its first dimension into one piece a rank."""

    step: int
    term: int
    tensors: Mapping[str, Whole]
    ranks: int = 2
    ours: Sequence[Mapping[str, Any]] = ({}, {})
    mine: Sequence[Mapping[str, Any]] = ({}, {})
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def plan(self) -> Plan:
        cut = [
            (i, region, min(n, self.ranks - 1))
            for i, name in enumerate(sorted(self.tensors))
            for n, region in enumerate(rows(self.tensors[name].array.shape, self.ranks))
        ]
        sizes = [region.numel * ITEMSIZE[self.tensors[sorted(self.tensors)[i]].dtype] for i, region, _ in cut]
        placed: dict[int, tuple[int, int]] = {}
        for rank in range(self.ranks):
            of_rank = [k for k, (_, _, writer) in enumerate(cut) if writer == rank]
            offsets, first_blocks, _ = place([sizes[k] for k in of_rank], BLOCK)
            placed |= dict(zip(of_rank, zip(offsets, first_blocks, strict=True), strict=True))
        return Plan(
            tuple(
                TensorRow(name, whole.dtype, whole.array.shape, whole.aliases)
                for name, whole in sorted(self.tensors.items())
            ),
            Fragments.of(
                Fragment(i, region, writer, placed[k][0], sizes[k], placed[k][1], writer)
                for k, (i, region, writer) in enumerate(cut)
            ),
            tuple(RankRow(rank, f"host{rank}", (("dp", rank),)) for rank in range(self.ranks)),
            tuple((rank,) for rank in range(self.ranks)),
            BLOCK,
        )

    def write(self, root: Path, term_id: str = "t1") -> Record:
        """Every object of the step but its term, below `root`."""
        plan = self.plan()
        content = encode_plan(plan)
        if not (root / plan_key(self.term, content.head.sha256)).exists():
            put(root, plan_key(self.term, content.head.sha256), content.data)
        rows = [self._write_data(root, plan, rank) for rank in range(self.ranks)]
        files = encode_files(rows)
        put(root, files_key(self.step, self.term), files)
        fragments, blocks = plan.fragments, sum(row.blocks for row in rows)
        record = Record(
            self.step,
            self.term,
            term_id,
            content.head,
            Digest(len(files), hashlib.sha256(files).hexdigest()),
            Counts(len(plan.tensors), len(fragments), self.ranks, blocks, sum(f.nbytes for f in fragments)),
            {"dscheck": "0.1.0"},
            1.0,
            2.5,
            f"attempt-{self.step}-{self.term}",
        )
        put(root, record_key(self.step, self.term), record.encode())
        return record

    def _write_data(self, root: Path, plan: Plan, rank: int) -> FileRow:
        data, sums = bytearray(), []
        names = [tensor.name for tensor in plan.tensors]
        for f in sorted((f for f in plan.fragments if f.writer == rank), key=lambda f: f.offset):
            raw = self.tensors[names[f.tensor]].array[f.region.slices()].tobytes()
            data += b"\xaa" * (f.offset - len(data)) + raw
            sums += [crc32c(raw[at : at + BLOCK]) for at in range(0, f.nbytes, BLOCK)]
            assert len(sums) == f.first_block + block_count(f.nbytes, BLOCK)
        data += bytes(align(len(data), CHECKSUM_ALIGNMENT) - len(data))
        parts = []
        ours, mine = ({p: encode_object(v, p) for p, v in o[rank].items()} for o in (self.ours, self.mine))
        for part in (np.array(sums, "<u4").tobytes(), encode_objects(ours, self.options), encode_objects(mine)):
            parts.append(Extent(len(data), len(part), hashlib.sha256(part).hexdigest()))
            data += part
        put(root, data_key(self.step, self.term, rank), bytes(data))
        return FileRow(rank, len(data), len(sums), *parts)


def rows(shape: Sequence[int], count: int) -> list[Region]:
    """Non-empty boxes that tile `shape`, cut along the first dimension; one for a 0-d tensor."""
    if not shape:
        return [Region((), ())]
    edges = [shape[0] * i // count for i in range(count + 1)]
    boxes = [Region((a, *[0] * (len(shape) - 1)), (b, *shape[1:])) for a, b in pairwise(edges)]
    return [box for box in boxes if box.numel]


def put(root: Path, key: str, data: bytes) -> None:
    path = root / key
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.write(data)


def put_term(root: Path, term: int, parent: tuple[int, int] | None = None) -> None:
    put(root, term_key(term), Term(term, f"t{term}", "t1", parent, "host0", 0.5).encode())


def model() -> dict[str, Whole]:
    """Tensors of all kinds: 0-d, empty, cut, of several blocks a rank, tied, and with elements that NumPy has not."""
    rng = np.random.default_rng(7)
    return {
        "model.bias": Whole("float32", rng.normal(size=5).astype("<f4")),
        "model.empty": Whole("int64", np.zeros((0, 3), "<i8")),
        "model.half": Whole("bfloat16", rng.integers(0, 2**16, (6, 5), "<u2").view("V2")),
        "model.steps": Whole("int64", np.array(7, "<i8")),
        "model.wide": Whole("uint8", rng.integers(0, 256, (3, 7, 300), "u1"), ("model.tied.weight",)),
        "optimizer.state.exp_avg.model.bias": Whole("complex64", (rng.normal(size=5) * 1j).astype("<c8")),
    }
