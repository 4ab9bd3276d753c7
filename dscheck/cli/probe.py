"""`dscheck probe`: what the storage of a root gives, and what dscheck reaches of it."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console

from dscheck.cli.text import console, size, table
from dscheck.probe import Findings, Rate, Way, probe
from dscheck.probe.run import describe


def show(root: str, megabytes: int, seconds: float, keep: bool, as_json: bool) -> None:
    """Print one row a way and one a set of settings. Raises ConfigError, StorageError."""
    with Console(stderr=True).status("probe") as status:
        found = probe(root, megabytes * 10**6, seconds, keep=keep, tell=lambda what: status.update(f"probe: {what}"))
    if as_json:
        print(json.dumps(_plain(found), indent=2))
        return
    _, write = found.best("write")
    _, read = found.best("read")
    shown = table(f"{root}, files of {size(found.nbytes)}", "", "write", "", "read", "", right=("write", "read"))
    for way, rate in found.ways.items():
        shown.add_row(_way(way), *_cells(rate, write, read))
    shown.add_section()
    for one in found.reached:
        shown.add_row(f"dscheck, {describe(one.settings)}", *_cells(Rate(one.save, one.load), write, read))
    console().print(shown)
    print("percentages are of the fastest; a write counts until it is durable, a save until it is committed")
    if found.stored is not None:
        print(f"stored for later jobs and for `dscheck plan`: {describe(found.chosen.settings)} ({found.stored})")


def _way(way: Way) -> str:
    return f"{'direct' if way.direct else 'buffered'}, {way.threads} x {way.block_bytes >> 20} MiB"


def _cells(rate: Rate, write: float, read: float) -> list[str]:
    cells = []
    for value, best in ((rate.write, write), (rate.read, read)):
        cells += ["refused", ""] if value is None else [f"{size(value)}/s", f"{value / best:.0%}"]
    return cells


def _plain(found: Findings) -> dict[str, Any]:
    return {
        "bytes": found.nbytes,
        "ways": [
            way._asdict() | {"write_bytes_s": rate.write, "read_bytes_s": rate.read} for way, rate in found.ways.items()
        ],
        "dscheck": [
            {"settings": one.settings, "save_bytes_s": one.save, "load_bytes_s": one.load} for one in found.reached
        ],
        "chosen": found.chosen.settings,
        "stored": found.stored,
    }
