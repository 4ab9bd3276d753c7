"""What a root holds, read without any rank."""

from __future__ import annotations

from pathlib import Path

from dscheck.commit import read_history
from dscheck.commit.contents import Contents
from dscheck.storage import LocalStorage


def newest(root: Path) -> Contents:
    """The newest step of a root that has one."""
    storage = LocalStorage(root)
    record = read_history(storage).resolve(None)
    assert record is not None
    return Contents.open(storage, record)
