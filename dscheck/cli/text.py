"""Numbers as people read them, and the one console."""

from __future__ import annotations

from datetime import datetime

from rich.console import Console
from rich.table import Table


def size(nbytes: float) -> str:
    """Decimal units, three digits: what disks are sold in.

    >>> size(15_700_000_000)
    '15.7 GB'
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if nbytes < 1000 or unit == "TB":
            return f"{nbytes:.3g} {unit}" if unit != "B" else f"{nbytes:.0f} B"
        nbytes /= 1000
    raise AssertionError


def when(seconds: float) -> str:
    """Local time to the second; seconds since 1970 where a calendar has no such day."""
    try:
        return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return f"{seconds:g} s"


def ranks(members: tuple[int, ...]) -> str:
    """Ranks with runs joined.

    >>> ranks((0, 1, 2, 5))
    '0-2,5'
    """
    runs: list[list[int]] = []
    for rank in members:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Table:
    """A table whose columns named in `right` are numbers."""
    made = Table(title=title, title_justify="left", header_style="bold", expand=False)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", no_wrap=column in right)
    return made


def console() -> Console:
    """Wide enough for a table when the output is a file or a pipe."""
    made = Console()
    return made if made.is_terminal else Console(width=160)
