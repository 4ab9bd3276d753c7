"""`dscheck cp`: committed steps to another root, with a progress bar on stderr."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import get_args

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from dscheck.cli.text import console, size, table
from dscheck.commit.copy import Copying, CopyPlan, StepCopy
from dscheck.commit.single_writer import SingleWriter
from dscheck.config import Commit
from dscheck.errors import ConfigError
from dscheck.storage import Storage


def show(
    source: Storage,
    destination: Storage,
    steps: Sequence[int] | None,
    threads: int,
    timeout_s: float,
    dry_run: bool,
    commit: str,
    as_json: bool,
) -> None:
    """Print one row a step. Raises what `CopyPlan` raises; what was copied before stays, and is not copied again."""
    if commit not in get_args(Commit):
        raise ConfigError(f"--commit {commit}: expected one of {', '.join(get_args(Commit))}")
    plan = CopyPlan(source, SingleWriter(destination) if commit == "single-writer" else destination, steps or None)
    found = plan.look()
    if not dry_run:
        columns = (TextColumn("copy"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("copy", total=sum(step.nbytes for step in found))
            found = plan.run(Copying(threads, timeout_s, lambda nbytes: progress.advance(task, nbytes)))
    if as_json:
        print(json.dumps([asdict(step) for step in found], indent=2))
    else:
        _print(found, destination.url)


def _print(found: Sequence[StepCopy], destination: str) -> None:
    shown = table(destination, "step", "term", "", "size", "was missing", right=("step", "size", "was missing"))
    for step in found:
        shown.add_row(str(step.step), str(step.term), step.outcome, size(step.nbytes), size(step.missing_bytes))
    console().print(shown)
    if not found:
        print("no steps yet")
