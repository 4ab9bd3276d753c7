"""`dscheck verify`: every block of a step, with a progress bar, and the list of what is damaged."""

from __future__ import annotations

import json

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from dscheck.cli.step import open_step
from dscheck.cli.text import console, size, table
from dscheck.commit.verify import verify
from dscheck.storage.base import Storage


def show(root: str | Storage, step: int | None, as_json: bool) -> bool:
    """Print what is damaged; whether nothing is. Raises what makes the step unreadable as a whole."""
    contents = open_step(root, step)
    columns = (TextColumn("verify step {task.fields[step]}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console(), transient=True, disable=as_json) as progress:
        task = progress.add_task("verify", total=contents.record.counts.bytes, step=contents.record.step)
        damage = list(verify(contents, lambda nbytes: progress.advance(task, nbytes)))
    if as_json:
        rows = [{"key": found.key, "offset": found.offset, "what": found.what} for found in damage]
        print(json.dumps({"step": contents.record.step, "damage": rows}, indent=2))
        return not damage
    counts = contents.record.counts
    print(f"step {contents.record.step}: {counts.blocks} blocks, {size(counts.bytes)}, {len(damage)} damaged")
    if damage:
        shown = table("damage", "object", "offset", "what", right=("offset",))
        for found in damage:
            shown.add_row(found.key, "" if found.offset is None else str(found.offset), found.what)
        console().print(shown)
    return not damage
