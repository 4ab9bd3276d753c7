"""`dscheck gc`: what no step needs is deleted, and said."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict

from dscheck.cli.text import size
from dscheck.commit.gc import Collected, collect
from dscheck.commit.listing import StepRef
from dscheck.storage import Storage, open_storage


def show(root: str | Storage, dry_run: bool, abandoned: bool, safe_age_h: float, as_json: bool) -> None:
    """Collect and print what went, or, in a dry run, what would. Raises what `collect` does."""
    found = collect(
        open_storage(root),
        by=f"gc on {socket.gethostname()}",
        now=time.time(),
        abandoned=abandoned,
        dry_run=dry_run,
        safe_age_s=safe_age_h * 3600,
    )
    if as_json:
        print(json.dumps({"dry_run": dry_run, **asdict(found)}, indent=2))
        return
    for line in _lines(found):
        print(line)
    print(f"{'would free' if dry_run else 'freed'} {size(found.bytes)}")


def _lines(found: Collected) -> list[str]:
    lines = [
        f"{what}: {_listed(refs)}"
        for what, refs in (
            ("attempts that were never committed", found.attempts),
            ("abandoned steps", found.abandoned),
            ("remains of deleted steps", found.deleted),
            ("marks of steps deleted long ago", found.marks),
        )
        if refs
    ]
    lines += [f"plans that no step names: {len(found.plans)}"] if found.plans else []
    return lines + ([f"left by killed writers: {found.unfinished}"] if found.unfinished else [])


def _listed(refs: Sequence[StepRef]) -> str:
    return ", ".join(f"{ref.step} of term {ref.term}" for ref in refs)
