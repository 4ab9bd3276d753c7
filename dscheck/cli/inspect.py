"""`dscheck inspect`: the tensors of a step, and for one tensor who holds and who wrote what."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from dscheck.cli.step import open_step
from dscheck.cli.text import console, ranks, size, table
from dscheck.commit.contents import Contents
from dscheck.commit.stored_sizes import StoredSizes
from dscheck.errors import CheckpointNotFoundError
from dscheck.manifest.blocks import Codec
from dscheck.storage.base import Storage


def show(root: str | Storage, step: int | None, tensor: str | None, as_json: bool) -> None:
    """Print one row a tensor, or one a fragment of `tensor`. Raises CheckpointNotFoundError for a name that is not
    there.
    """
    contents = open_step(root, step)
    rows = tensors(contents) if tensor is None else fragments(contents, tensor)
    if as_json:
        print(json.dumps({"step": contents.record.step, "term": contents.record.term, "rows": rows}, indent=2))
        return
    print(f"step {contents.record.step} of term {contents.record.term}: {_summary(contents)}")
    right = ("bytes", "stored", "ratio", "fragments", "offset")
    if not rows:
        return
    shown = table(tensor or "", *rows[0], right=right)
    for row in rows:
        shown.add_row(*(_cell(name, value) for name, value in row.items()))
    console().print(shown)


def tensors(contents: Contents) -> list[dict[str, Any]]:
    """Name, aliases, dtype, shape and number of fragments of each tensor, its bytes and how they are stored."""
    count, stored, codec = (np.zeros(len(contents.plan.tensors), np.int64) for _ in range(3))
    sizes = StoredSizes(contents)
    for batch in contents.plan.batches():
        nbytes, codecs = sizes.of(batch)
        np.add.at(count, batch.tensor, 1)
        np.add.at(stored, batch.tensor, nbytes)
        np.maximum.at(codec, batch.tensor, codecs)
    return [
        {
            "tensor": row.name,
            "dtype": row.dtype,
            "shape": list(row.shape),
            "bytes": row.nbytes,
            **_stored(row.nbytes, int(stored[number]), int(codec[number])),
            "fragments": int(count[number]),
            "aliases": list(row.aliases),
        }
        for number, row in enumerate(contents.plan.tensors)
    ]


def fragments(contents: Contents, tensor: str) -> list[dict[str, Any]]:
    """The fragments of one tensor: its box, its holders, its writer with host and mesh coordinate, where it lies by the
    plan, and how it is stored.
    """
    index = contents.plan.index()
    if tensor not in index:
        close = difflib.get_close_matches(tensor, index, n=3)
        hint = f"; close are {', '.join(close)}" if close else ""
        raise CheckpointNotFoundError(f"step {contents.record.step} has no tensor '{tensor}'{hint}", tensor=tensor)
    plan = contents.plan
    found = plan.fragments_of(index[tensor])
    stored, codecs = StoredSizes(contents).of(found)
    return [
        {
            "region": str(fragment.region),
            "held by": list(plan.holders[fragment.holders]),
            "written by": fragment.writer,
            "host": plan.ranks[fragment.writer].host,
            "mesh": dict(plan.ranks[fragment.writer].mesh),
            "file": contents.key(fragment.writer),
            "offset": fragment.offset,
            "bytes": fragment.nbytes,
            **_stored(fragment.nbytes, int(stored[number]), int(codecs[number])),
        }
        for number, fragment in enumerate(found)
    ]


def _stored(nbytes: int, stored: int, codec: int) -> dict[str, Any]:
    return {"codec": str(Codec(codec)), "stored": stored, "ratio": round(nbytes / stored, 3) if stored else 1.0}


def _summary(contents: Contents) -> str:
    counts = contents.record.counts
    stored = sum(file.checksums.offset for file in contents.files)
    smaller = f", {size(stored)} stored" if any(file.coded for file in contents.files) else ""
    return (
        f"{counts.tensors} tensors, {counts.fragments} fragments, {size(counts.bytes)}{smaller}, written by "
        f"{counts.ranks} ranks in {contents.record.committed - contents.record.started:.2f} s"
    )


def _cell(name: str, value: Any) -> str:
    if name in ("bytes", "stored"):
        return size(value)
    if name == "held by":
        return ranks(tuple(value))
    if isinstance(value, dict):
        return " ".join(f"{key}={item}" for key, item in value.items())
    if name == "shape":
        return _joined(value, " x ") or "scalar"
    return _joined(value, " ") if isinstance(value, list) else str(value)


def _joined(values: Iterable[Any], between: str) -> str:
    return between.join(map(str, values))
