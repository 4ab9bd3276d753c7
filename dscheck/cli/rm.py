"""`dscheck rm`: steps that are named are deleted, once it is sure that they are meant."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Sequence

import typer

from dscheck.cli.named import named_step
from dscheck.cli.text import size, when
from dscheck.commit.delete import delete_step
from dscheck.commit.history import read_history
from dscheck.commit.listing import StepRef
from dscheck.commit.pins import pinned, unpin
from dscheck.errors import ConfigError
from dscheck.manifest.record import Record
from dscheck.storage import Storage, open_storage


def show(root: str | Storage, names: Sequence[str], yes: bool, force: bool, as_json: bool) -> None:
    """Delete the steps, all of which must be there and may go. Raises ConfigError when not; aborts at a "no"."""
    storage = open_storage(root)
    records = _chosen(storage, names, force)
    if not yes:
        _ask(storage, records)
    freed, by = 0, f"rm on {socket.gethostname()}"
    for record in records:
        freed += delete_step(storage, record, by=by, now=time.time())
        unpin(storage, _ref(record))
    if as_json:
        print(json.dumps({"deleted": [{"step": r.step, "term": r.term} for r in records], "bytes": freed}, indent=2))
        return
    print(f"deleted {', '.join(map(_named, records))}: {size(freed)}")


def _chosen(storage: Storage, names: Sequence[str], force: bool) -> list[Record]:
    history = read_history(storage)
    records = list({_ref(record): record for record in (named_step(history, name) for name in names)}.values())
    pins = pinned(storage)
    for record in records:
        ref = _ref(record)
        why = "pinned" if ref in pins else "the newest one, which a job continues from" if ref == history.newest else ""
        if why and not force:
            raise ConfigError(
                f"{storage.url}: {_named(record)} is {why}; nothing was deleted: use --force if you mean it"
            )
    return records


def _ask(storage: Storage, records: Sequence[Record]) -> None:
    """Raises ConfigError where nobody can be asked; typer.Abort at any answer but yes."""
    if not sys.stdin.isatty():
        raise ConfigError("nobody is there to be asked: say --yes")
    for record in records:
        print(f"{_named(record)}, committed {when(record.committed)}, {size(record.counts.bytes)}")
    typer.confirm(f"Delete {len(records)} from {storage.url}?", abort=True)


def _ref(record: Record) -> StepRef:
    return StepRef(record.step, record.term)


def _named(record: Record) -> str:
    return f"step {record.step} of term {record.term}"
