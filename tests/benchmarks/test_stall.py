"""What benchmarks.stall stands on, and all of it at shapes that take seconds, without a CUDA device."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import prototypes
from benchmarks.launch import REPOSITORY, run_ranks
from benchmarks.sink import SinkStorage
from benchmarks.stall import TINY_RANK_BYTES
from benchmarks.stall_cost import measure
from benchmarks.stall_job import TINY, Training
from benchmarks.stall_often import Span, by_drain
from benchmarks.stall_soak import digest, fingerprint, names
from benchmarks.stall_targets import targets
from dscheck import Checkpointer

CPU = torch.device("cpu")


@pytest.fixture
def job() -> Training:
    training = Training(TINY, 2, CPU)
    training.run(1)
    return training


def test_a_sink_commits_every_step_and_keeps_no_bytes(tmp_path: Path, job: Training) -> None:
    with Checkpointer(SinkStorage(tmp_path), job.state()) as ckpt:
        for _ in range(3):
            job.train_step()
            ckpt.save(job.steps).wait()
        assert ckpt.steps() == [2, 3, 4]
    data = list(tmp_path.rglob("data-*.bin"))
    assert len(data) == 3
    assert all(path.stat().st_size > job.nbytes() and path.stat().st_blocks == 0 for path in data)


@pytest.mark.parametrize("numel", [1, 7, 8 << 20])
def test_a_digest_sees_every_flipped_bit_and_a_swap(numel: int) -> None:
    tensor = torch.arange(numel, dtype=torch.int16)
    before = digest(tensor)
    assert torch.equal(before, digest(tensor.clone()))
    for place in {0, numel // 2, numel - 1}:
        tensor[place] ^= 1 << 13
        assert not torch.equal(before, digest(tensor))
        tensor[place] ^= 1 << 13
    if numel > 1:
        tensor[0], tensor[-1] = tensor[-1].clone(), tensor[0].clone()
        assert not torch.equal(before, digest(tensor))


def test_every_tensor_of_a_training_has_a_hash_that_a_step_changes(job: Training) -> None:
    before = fingerprint(job)
    job.train_step()
    same = [name for name, equal in zip(names(job), (fingerprint(job) == before).tolist(), strict=True) if equal]
    assert same == []


class FakeStream:
    def wait_stream(self, other: object) -> None: ...

    def wait_event(self, event: object) -> None:
        assert event is not None

    def record_event(self) -> object:
        return object()


class FakeEvent:
    def record(self) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: object) -> float:
        return 3.0


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Streams and events of a device that has done everything as soon as it is asked to."""
    fake = SimpleNamespace(
        Stream=lambda device: FakeStream(),
        Event=lambda enable_timing: FakeEvent(),
        stream=lambda stream: contextlib.nullcontext(),
        current_stream=FakeStream,
        is_available=lambda: False,
    )
    monkeypatch.setattr(prototypes, "cuda", fake)
    return iter([None])


@pytest.mark.parametrize("part", [0.0, 0.5, 2.0])
@pytest.mark.usefixtures("fake_cuda")
def test_a_prototype_copies_every_tensor_whatever_it_spills(part: float, job: Training) -> None:
    method = prototypes.SideStream(job, int(part * job.nbytes()))
    moment = [tensor.clone() for _, tensor in job.tensors()]
    method.save(1)
    job.train_step()
    assert all(torch.equal(one, other) for one, other in zip(moment, method.host_tensors, strict=True))
    method.close()
    costs = measure(job, prototypes.SideStream(job), windows=1, steps=3)
    assert costs["persisted_s"] == [0.003]


class FailsAtTheSecond:
    """A Method that has one save in it."""

    def __init__(self) -> None:
        self.saves = 0

    def save(self, step: int) -> None:
        self.saves += 1

    def guard(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def busy(self) -> bool:
        return False

    def wait(self) -> float:
        if self.saves > 1:
            raise KeyError("while staging")
        return 0.5

    def remove(self, step: int) -> None: ...

    def close(self) -> None: ...


def test_what_was_measured_before_a_save_failed_is_kept(job: Training) -> None:
    costs = measure(job, FailsAtTheSecond(), windows=3, steps=3)
    assert costs["persisted_s"] == [0.5]
    assert len(costs["extra_ms"]) == 1
    assert costs["failed"] == "save 2: KeyError: 'while staging'"


def test_steps_are_told_apart_by_the_drain_they_meet() -> None:
    steps = [Span(at, at + 1.0) for at in range(8)]
    sets = by_drain(steps, [Span(1.0, 2.5), Span(5.5, 5.9)])
    assert [span.began for span in sets["overlapped"]] == [1, 2, 5]
    assert [span.began for span in sets["first"]] == [1, 5]
    assert [span.began for span in sets["later"]] == [2]


def test_targets_are_of_medians_and_of_the_machine_s_own_limit() -> None:
    costs = {"step_ms": 160.0, "call_ms": [9.0, 1.0, 1.5], "part": "ours"}
    rows: dict[str, dict[str, Any]] = {
        "training": {"part": "limits", "state_bytes": 15_700_000_000, "forward_backward_ms": 145.0},
        "machine": {"part": "limits", "host_gb_s": 54.8},
        "dscheck": {**costs, "extra_ms": [8.0, 9.0, 3.0]},
        "dscheck, no device memory": {**costs, "extra_ms": [200.0, 140.0, 150.0]},
    }
    verdicts = {target.what: target.verdict for target in targets(rows)}
    assert verdicts == {
        "extra a save, spare device memory": "reached",
        # 1.05 x (286.5 - 145) = 148.6
        "extra a save, no device memory": "missed",
        "save() call, median, dscheck": "reached",
        "save() call, median, dscheck, no device memory": "reached",
        "first save's extra, dscheck": "reached",
        "first save's extra, dscheck, no device memory": "reached",
    }


def test_stall_measures_all_parts_and_leaves_nothing_behind(tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    options = ["--device", "cpu", "--tiny", "--dir", str(work), "--out", str(out), "--trace", str(tmp_path / "trace")]
    command = [sys.executable, "-m", "benchmarks.stall", *options]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280, check=False)
    result = json.loads((out / "stall.json").read_text())
    rows = {row["row"]: row for row in result["rows"]}
    failed = {name for name, row in rows.items() if "error" in row or "failed" in row}
    # The last two: by what is installed here.
    assert failed - {"DCP async_save, DefaultStager", "torch_checkpointing"} == {"limit A", "limit B"}, done.stderr
    assert {row["part"] for row in rows.values()} == {"limits", "ours", "often", "soak", "rivals"}
    soaked = [row for row in rows.values() if row["part"] == "soak"]
    assert sum(row["committed"] for row in soaked) == 8
    assert all(row["damaged"] == row["errors"] == [] and row["different"] == {} for row in soaked)
    assert list(work.iterdir()) == []
    assert str(tmp_path) not in (out / "stall.md").read_text() + (out / "stall.json").read_text()


def test_all_reduces_are_measured_on_two_ranks(tmp_path: Path) -> None:
    log = tmp_path / "log"
    status = run_ranks(2, "benchmarks.stall_ranks", [tmp_path, "cpu", TINY_RANK_BYTES], log=log, timeout_s=120)
    assert status == 0, log.read_text()
    measured = json.loads((tmp_path / "ranks.json").read_text())
    assert measured["ranks"] == 2
    assert measured["operations_during"] > 0
