"""`dscheck ls`: the steps of a root, from its records alone."""

from __future__ import annotations

import json
from typing import Any

from dscheck.cli.text import console, size, table, when
from dscheck.commit.history import read_history
from dscheck.commit.listing import StepRef
from dscheck.commit.pins import pinned, read_pin
from dscheck.errors import CheckpointNotFoundError
from dscheck.storage import Storage, open_storage


def show(root: str | Storage, as_json: bool) -> None:
    """Print one row a step. Raises CheckpointNotFoundError when there is no root at all."""
    storage = open_storage(root)
    rows = steps(storage)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    shown = table(
        *(storage.url, "step", "term", "history", "committed", "size", "tensors", "ranks", "took", "metrics", "pin"),
        right=("step", "size", "took"),
    )
    for row in rows:
        numbers = (str(row["step"]), str(row["term"]), row["history"], when(row["committed"]), size(row["bytes"]))
        metrics = " ".join(f"{name}={_number(value)}" for name, value in row["metrics"].items())
        pin = "" if row["pin"] is None else row["pin"]["note"] or "pinned"
        shown.add_row(*numbers, str(row["tensors"]), str(row["ranks"]), f"{row['took_s']:.2f} s", metrics, pin)
    console().print(shown)
    if not rows:
        print("no steps yet")


def steps(root: str | Storage) -> list[dict[str, Any]]:
    """What `ls` knows of each committed step, ascending; `history` is newest, live or abandoned."""
    storage = open_storage(root)
    history = read_history(storage)
    if not history.terms and next(iter(storage.list("")), None) is None:
        raise CheckpointNotFoundError(f"{storage.url}: there is no checkpoint root here")
    pins = pinned(storage)
    rows = []
    for ref in sorted({*history.visible, *history.abandoned}):
        record = history.record(ref)
        state = "newest" if ref == history.newest else "live" if ref in history.visible else "abandoned"
        counts = record.counts
        rows.append(
            {
                "step": ref.step,
                "term": ref.term,
                "history": state,
                "committed": record.committed,
                "took_s": record.committed - record.started,
                "bytes": counts.bytes,
                "tensors": counts.tensors,
                "fragments": counts.fragments,
                "ranks": counts.ranks,
                "versions": dict(record.versions),
                "metrics": dict(record.metrics),
                "pin": _pin(storage, ref) if ref in pins else None,
            }
        )
    return rows


def _pin(storage: Storage, ref: StepRef) -> dict[str, Any]:
    found = read_pin(storage, ref)
    return {"note": found.note, "by": found.by, "time": found.time}


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.6g}"
