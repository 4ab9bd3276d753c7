"""The trace of a save: valid events on the expected tracks, also of one that failed, and never a reason to fail."""

from __future__ import annotations

import errno
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from dscheck.errors import DscheckError
from dscheck.ranks.base import Ranks
from dscheck.save.trace import Trace
from dscheck.snapshot import Span
from dscheck.testing.faults import Faulty, fail_at, hang
from tests.end_to_end.worlds import fresh, job, open_on

pytestmark = pytest.mark.filterwarnings("ignore:dscheck:RuntimeWarning")


def traced(folder: Path, step: int, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"trace-{step}-rank{rank}.json").read_text())
    return found


def spans(trace: dict[str, Any]) -> list[tuple[str, str]]:
    """(track, name) of each complete event, in the order of their beginnings."""
    events = trace["traceEvents"]
    tracks = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    return [(tracks[event["tid"]], event["name"]) for event in events if event["ph"] == "X"]


def test_a_trace_shows_each_stage_on_its_thread(tmp_path: Path) -> None:
    root, folder = fresh(), tmp_path / "traces"

    def run(ranks: Ranks) -> None:
        net = torch.nn.Linear(300, 1500)
        state = {"net": net, "opt": torch.optim.AdamW(net.parameters())}
        with open_on(ranks, root, state, trace=str(folder), replicas="first") as ckpt:
            for step in (1, 2):
                net(torch.ones(1, 300)).sum().backward()
                state["opt"].step()
                ckpt.save(step)

    job(2, run)
    for step in (1, 2):
        found = [set(spans(traced(folder, step, rank))) for rank in range(2)]
        for rank in range(2):
            assert ("training", "save()") in found[rank]
            stages = {name for track, name in found[rank] if track == "dscheck-save"}
            assert stages >= {"plan", "encode objects", "await the proof", "commit the data file", "arrive"}
        writer = {name for _, name in found[0]}
        assert writer >= {"plan of all ranks", "record", "write"}
        assert "record" not in {name for _, name in found[1]}
        assert any(track.startswith("capture") for track, _ in found[0])
        trace = traced(folder, step)
        assert trace["otherData"] == {"root": root.url, "step": step, "outcome": "committed"}
        assert all(event["dur"] >= 0 for event in trace["traceEvents"] if event["ph"] == "X")


def test_spans_lie_within_the_save_in_microseconds(tmp_path: Path) -> None:
    def run(ranks: Ranks) -> tuple[float, float]:
        with open_on(ranks, fresh(), {"x": torch.ones(1 << 20)}, trace=str(tmp_path)) as ckpt:
            handle = ckpt.save(1)
            handle.wait()
            return handle.began, handle.began + (handle.stats.committed_s or 0.0)

    began, ended = job(1, run)[0]
    for event in traced(tmp_path, 1)["traceEvents"]:
        if event["ph"] == "X":
            assert 1e6 * began - 1e6 <= event["ts"] <= event["ts"] + event["dur"] <= 1e6 * ended + 1e6
    written = [event["args"]["bytes"] for event in traced(tmp_path, 1)["traceEvents"] if event["name"] == "write"]
    assert sum(written) >= 4 << 20


def test_a_failed_save_has_a_trace_with_its_error(tmp_path: Path) -> None:
    root = fresh()

    def run(ranks: Ranks) -> None:
        storage = Faulty(root, fail_at("commit", "steps/1/*", error=errno.ENOSPC))
        with open_on(ranks, storage, {"x": torch.ones(3)}, trace=str(tmp_path)) as ckpt, pytest.raises(DscheckError):
            ckpt.save(1).wait()

    job(1, run)
    trace = traced(tmp_path, 1)
    assert "No space left" in trace["otherData"]["outcome"]
    assert ("dscheck-save", "commit the data file") in spans(trace)


def test_a_save_that_was_given_up_shows_where_it_hangs(tmp_path: Path) -> None:
    root, never = fresh(), threading.Event()

    def run(ranks: Ranks) -> None:
        storage = Faulty(root, hang(never, "commit", "steps/1/*"))
        with open_on(ranks, storage, {"x": torch.ones(3)}, trace=str(tmp_path), timeout_s=0.3) as ckpt:
            with pytest.raises(DscheckError):
                ckpt.save(1).wait()
            ckpt.save(2).wait()

    job(1, run)
    never.set()
    hung = [event for event in traced(tmp_path, 1)["traceEvents"] if event.get("args", {}).get("unfinished")]
    assert [event["name"] for event in hung] == ["commit the data file"]


def test_a_trace_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    """Invariant C8."""
    (tmp_path / "file").write_text("in the way")

    def run(ranks: Ranks) -> list[int]:
        with open_on(ranks, fresh(), {"x": torch.ones(3)}, trace=str(tmp_path / "file" / "folder")) as ckpt:
            ckpt.save(1).wait()
            ckpt.save(2).wait()
            return ckpt.steps()

    with pytest.warns(RuntimeWarning, match=r"trace-1-rank0\.json' was not written"):
        assert job(1, run) == [[1, 2]]


def test_spans_of_the_capture_have_tracks_of_their_own(tmp_path: Path) -> None:
    trace = Trace(str(tmp_path), 3, 1)
    with trace.span("outer"):
        trace.open("training", "call", 1.0).ended = 2.0
    trace.write([Span("capture device 0", "w", 1.25, 1.5, 64)], {})
    found = traced(tmp_path, 3, 1)
    event = next(event for event in found["traceEvents"] if event["name"] == "w")
    assert (event["ts"], event["dur"], event["pid"], event["args"]) == (1.25e6, 0.25e6, 1, {"bytes": 64})
    assert len({event["tid"] for event in found["traceEvents"] if event["ph"] == "X"}) == 3


def test_without_a_folder_nothing_is_kept() -> None:
    trace = Trace(None, 1, 0)
    with trace.span("write", 8):
        trace.open("training", "save()", 0.0)
    trace.write([], {})
    assert trace._spans == []
