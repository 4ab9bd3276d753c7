"""What one rank of a training run saw, line by line, so that a rank that is killed leaves all it knew."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dscheck import LoadReport, SaveHandle


class Journal:
    """JSON lines in a file, or on standard output: what was loaded, every step, and every save that has ended."""

    def __init__(self, path: Path | None) -> None:
        self._file = sys.stdout if path is None else path.open("a", buffering=1)
        self._saves: list[SaveHandle] = []

    def loaded(self, report: LoadReport | None) -> None:
        self._write("load", {} if report is None else asdict(report))

    def stepped(self, step: int, loss: float, seconds: float) -> None:
        self._write("step", {"step": step, "loss": loss, "seconds": seconds})
        self.collect()

    def follow(self, handle: SaveHandle) -> None:
        """Write down what becomes of this save, once it has ended."""
        self._saves.append(handle)

    def collect(self) -> None:
        """Write down the followed saves that ended since the last call."""
        for handle in [handle for handle in self._saves if handle.done]:
            self._saves.remove(handle)
            error = None if handle.error is None else str(handle.error)
            self._write("save", {"step": handle.step, "error": error, **asdict(handle.stats)})

    def _write(self, kind: str, line: dict[str, Any]) -> None:
        self._file.write(json.dumps({"kind": kind, **line}) + "\n")


def read_journal(path: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind, floats bit for bit; what a killed rank left half written is no line."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [line for line in map(json.loads, lines) if line["kind"] == kind]
