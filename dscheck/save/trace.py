"""What one save did and when, on which thread or stream, as a file that Perfetto and chrome://tracing open."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from dscheck.snapshot import Span

TRAINING = "training"
"""The track of the training thread."""

_OFF: AbstractContextManager[None] = contextlib.nullcontext()


@dataclass(slots=True)
class OpenSpan:
    """A stretch of work that ends when `ended` is set, in seconds of time.monotonic()."""

    track: str
    name: str
    began: float
    nbytes: int = 0
    ended: float | None = None


class Trace:
    """Collects the spans of one save on one rank, from any thread. Without a folder it keeps nothing."""

    def __init__(self, folder: str | None, step: int, rank: int) -> None:
        self._folder, self._step, self._rank = folder, step, rank
        self._spans: list[OpenSpan] = []

    @property
    def on(self) -> bool:
        return self._folder is not None

    def span(self, name: str, nbytes: int = 0) -> AbstractContextManager[None]:
        """Times what runs in it, on the track of the calling thread."""
        return self._timed(name, nbytes) if self.on else _OFF

    def open(self, track: str, name: str, began: float, nbytes: int = 0) -> OpenSpan:
        """A span that the caller ends; one that is open when the trace is written is marked as unfinished."""
        span = OpenSpan(track, name, began, nbytes)
        if self.on:
            self._spans.append(span)
        return span

    @contextlib.contextmanager
    def _timed(self, name: str, nbytes: int) -> Iterator[None]:
        span = self.open(threading.current_thread().name, name, time.monotonic(), nbytes)
        try:
            yield
        finally:
            span.ended = time.monotonic()

    def write(self, captured: Iterable[Span], about: dict[str, Any]) -> None:
        """Write all spans, with those of the capture, to the folder. A trace that cannot be written is a warning."""
        if self._folder is None:
            return
        path = os.path.join(self._folder, f"trace-{self._step}-rank{self._rank}.json")
        try:
            os.makedirs(self._folder, exist_ok=True)
            with open(path, "w", encoding="utf-8") as file:
                json.dump(self._events([*self._spans, *captured], about), file)
        except Exception as error:
            with contextlib.suppress(RuntimeWarning):  # raised where warnings are errors
                warnings.warn(f"dscheck: the trace '{path}' was not written: {error}", RuntimeWarning, stacklevel=2)

    def _events(self, spans: list[OpenSpan | Span], about: dict[str, Any]) -> dict[str, Any]:
        """Chrome's JSON: complete events in microseconds of this host's monotonic clock, one thread a track."""
        tracks = {name: tid for tid, name in enumerate(dict.fromkeys([TRAINING, *(s.track for s in spans)]), 1)}
        names = [("process_name", 0, f"rank {self._rank}"), *(("thread_name", tracks[name], name) for name in tracks)]
        events = [
            {"ph": "M", "name": kind, "pid": self._rank, "tid": tid, "args": {"name": name}}
            for kind, tid, name in names
        ]
        now = time.monotonic()
        for span in sorted(spans, key=lambda span: span.began):
            ended = now if span.ended is None else span.ended
            times = {"ts": 1e6 * span.began, "dur": 1e6 * max(0.0, ended - span.began)}
            about_it = ({"bytes": span.nbytes} if span.nbytes else {}) | ({} if span.ended else {"unfinished": True})
            where = {"pid": self._rank, "tid": tracks[span.track]}
            events.append({"ph": "X", "name": span.name, **where, **times, "args": about_it})
        return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}
