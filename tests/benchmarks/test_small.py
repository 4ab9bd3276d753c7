"""What the benchmarks and the demo stand on, at sizes that take seconds."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from benchmarks import demo, demo_killed
from benchmarks.corpus import Windows, library_sources
from benchmarks.gpt import GPT, Shape, cut_by_columns_and_rows, shard_fully
from benchmarks.journal import Journal, read_journal
from benchmarks.launch import REPOSITORY, run_ranks, trouble
from benchmarks.machine import describe
from benchmarks.raw_disk import WAYS, evict, read_direct, seconds_of, write_direct
from benchmarks.sharded_state import Layout, contents, gpt_shapes, live
from benchmarks.versus_page import LEAST_OF_RAW, of_best_rival, of_raw, page, targets
from benchmarks.versus_replicas import Counting, replicas
from dscheck.probe import Way
from dscheck.storage.memory import MemoryStorage

SMALL = Shape(vocabulary=256, length=16, width=24, heads=4, hidden=30, layers=2)


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def console() -> demo.Console:
    return demo.Console(quiet=True)


def loss_and_gradients(model: GPT) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    tokens = torch.arange(32).reshape(2, 16)
    loss = model(tokens, tokens + 1)
    loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    return loss.detach(), {
        name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in gradients.items()
    }


@pytest.mark.parametrize(("tp", "fsdp"), [(True, False), (False, True), (True, True)])
@pytest.mark.usefixtures("one_rank")
def test_a_cut_model_has_the_loss_and_gradients_of_the_whole(tp: bool, fsdp: bool) -> None:
    torch.manual_seed(0)
    whole = GPT(SMALL)
    cut = GPT(SMALL)
    cut.load_state_dict(whole.state_dict())
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("fsdp", "tp"))
    if tp:
        cut_by_columns_and_rows(cut, mesh["tp"])
    if fsdp:
        shard_fully(cut, mesh["fsdp"])
    loss, gradients = loss_and_gradients(cut)
    expected_loss, expected = loss_and_gradients(whole)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(gradients, expected)


def test_the_head_is_still_the_embedding_in_a_cut_model(one_rank: None) -> None:
    model = GPT(SMALL)
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("fsdp", "tp"))
    cut_by_columns_and_rows(model, mesh["tp"])
    shard_fully(model, mesh["fsdp"])
    assert model.head.weight is model.tokens.weight


def test_a_loader_goes_on_where_it_was_saved() -> None:
    text = library_sources(10_000)
    first = Windows(text, 16, seed=1)
    first.draw(8)
    saved = first.state_dict()
    expected = first.draw(8)
    second = Windows(text, 16, seed=2)
    second.load_state_dict(saved)
    assert all(torch.equal(one, other) for one, other in zip(second.draw(8), expected, strict=True))
    assert second.drawn == 16


def test_targets_are_the_next_bytes_of_the_text() -> None:
    tokens, targets = Windows(library_sources(10_000), 16, seed=1).draw(4)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])


def test_a_journal_keeps_floats_and_leaves_a_torn_line_out(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.jsonl"
    Journal(path).stepped(1, 0.1 + 0.2, 1.0)
    with path.open("a") as file:
        file.write('{"kind": "step", "step": 2, "lo')
    assert [(line["step"], line["loss"]) for line in read_journal(path, "step")] == [(1, 0.1 + 0.2)]


def write_losses(folder: Path, losses: dict[demo.Run, dict[int, float]]) -> None:
    for run, by_step in losses.items():
        (folder / run.name).mkdir()
        journal = Journal(folder / run.name / "rank-0.jsonl")
        for step, loss in by_step.items():
            journal.stepped(step, loss, 0.1)


def agreeing() -> dict[demo.Run, dict[int, float]]:
    whole = {step: 5.0 / step for step in range(1, demo.STEPS + 1)}
    late = {step: loss for step, loss in whole.items() if step > demo.RESUMED}
    killed = {step: loss for step, loss in whole.items() if step < demo.KILL_STEP}
    return {demo.WHOLE: whole, demo.KILLED: killed} | {run: dict(late) for run in demo.RESUMES}


def test_the_demo_accepts_losses_that_agree(tmp_path: Path, console: demo.Console) -> None:
    losses = agreeing()
    losses[demo.RESUMES[1]][demo.STEPS] *= 1 + 0.9 * demo.TOLERANCE
    write_losses(tmp_path, losses)
    demo.check(demo.Demo(tmp_path, console))


@pytest.mark.parametrize(
    ("run", "factor"),
    [(demo.KILLED, 1 + 1e-15), (demo.RESUMES[0], 1 + 1e-15), (demo.RESUMES[2], 1 + 2 * demo.TOLERANCE)],
)
def test_the_demo_refuses_a_loss_that_differs(
    tmp_path: Path, console: demo.Console, run: demo.Run, factor: float
) -> None:
    losses = agreeing()
    losses[run][demo.RESUMED + 1] *= factor
    write_losses(tmp_path, losses)
    with pytest.raises(demo.Disagreement, match=run.name):
        demo.check(demo.Demo(tmp_path, console))


def test_the_demo_refuses_a_run_that_stopped_early(tmp_path: Path, console: demo.Console) -> None:
    losses = agreeing()
    del losses[demo.RESUMES[1]][demo.STEPS]
    write_losses(tmp_path, losses)
    with pytest.raises(demo.Disagreement, match="has no loss of steps"):
        demo.check(demo.Demo(tmp_path, console))


class Killed(BaseException):
    """In the place of SIGKILL."""


@pytest.mark.parametrize("writes", [1, 4])
def test_the_killed_rank_dies_half_way_in_its_file(writes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(pid: int, signal: int) -> None:
        raise Killed

    memory = MemoryStorage(f"dies-after-{writes}")
    with_file(memory, "steps/4/1/data-2.bin", 1)
    monkeypatch.setattr(os, "kill", die)
    monkeypatch.setattr(demo_killed, "open_storage", lambda root: memory)
    storage = demo_killed.dying("root", rank=2, step=8)
    with_file(storage, "steps/8/1/data-0.bin", writes)
    with pytest.raises(Killed):
        with_file(storage, "steps/8/1/data-2.bin", writes)
    sizes = {entry.key: entry.size for entry in memory.list("steps/8/")}
    assert sizes["steps/8/1/data-0.bin"] == 1000
    assert 450 <= sizes["steps/8/1/data-2.bin"] <= 650


def with_file(storage: object, key: str, writes: int) -> None:
    writer = storage.create(key)
    for _ in range(writes):
        writer.write(bytes(1000 // writes))
    writer.commit()


@pytest.mark.parametrize("start", [(0, 0), (3, 5)])
def test_contents_of_a_box_are_that_part_of_the_whole(start: tuple[int, int]) -> None:
    shape = torch.Size((9, 14))
    whole = contents("a", shape, (0, 0), shape)
    box = contents("a", shape, start, torch.Size((4, 6)))
    assert torch.equal(box, whole[start[0] : start[0] + 4, start[1] : start[1] + 6])
    assert len(whole.unique()) == whole.numel()
    assert not torch.equal(whole, contents("b", shape, (0, 0), shape))


@pytest.mark.parametrize("nbytes", [4 * 10**6, 2 * 10**9])
def test_the_state_has_the_wanted_size(nbytes: int) -> None:
    total = 12 * sum(torch.Size(shape).numel() for shape in gpt_shapes(nbytes).values())
    assert total == pytest.approx(nbytes, rel=0.02)


@pytest.mark.parametrize("layout", ["rows", "columns", "stages"])
@pytest.mark.usefixtures("one_rank")
def test_one_flipped_bit_of_a_loaded_state_is_named(layout: Layout) -> None:
    state = live(gpt_shapes(4 * 10**6), layout, init_device_mesh("cpu", (1,)))
    assert set(state.wrong()) > {"tokens.weight", "tokens.weight.exp_avg_sq"}
    state.fill()
    assert state.wrong() == []
    tensor = state.named()["layers.0.up.weight.exp_avg"]
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    local.view(torch.int32)[3, 5] ^= 1
    assert state.wrong() == ["layers.0.up.weight.exp_avg"]


@pytest.mark.parametrize("way", [Way(), Way(True, 1 << 20, 3)])
@pytest.mark.parametrize("nbytes", [1, 4096, (4 << 20) + 5])
def test_the_raw_disk_writes_and_reads_any_length(tmp_path: Path, nbytes: int, way: Way) -> None:
    direct = write_direct(tmp_path / "file", nbytes, way)
    assert 0 <= (tmp_path / "file").stat().st_size - nbytes < 4096
    assert evict(tmp_path, everything=False) == "posix_fadvise"
    assert read_direct(tmp_path / "file", nbytes, way) == direct


def test_a_way_at_the_raw_disk_leaves_no_file(tmp_path: Path) -> None:
    assert all(seconds > 0 for seconds in seconds_of(tmp_path / "file", 3 << 20, WAYS[-1]))
    assert list(tmp_path.iterdir()) == []


def measured(*rounds: tuple[float, float]) -> list[dict[str, object]]:
    """The raw disk's and a contender's seconds for all works, in rounds of which the first does not count."""
    lines: list[dict[str, object]] = []
    for step, (raw, mine) in enumerate(rounds):
        for who, taken, works in (
            ("raw", raw, ("save", "rows", "fewer", "more")),
            ("contender", mine, ("save", "rows", "columns", "stages", "fewer", "more")),
        ):
            lines += [
                {"who": who, "work": work, "first": step == 0, "seconds": taken}
                | ({"durable": taken, "returned": taken, "free": taken} if work == "save" else {"read_per_wanted": 1.0})
                for work in works
            ]
    return lines


def compared(lines: dict[str, list[dict[str, object]]]) -> dict[str, object]:
    raw = {"write": "1 x 4 MiB", "read": "1 x 4 MiB", "rates": [{"way": "1 x 4 MiB", "write": 1e9, "read": 2e9}]}
    facts = {"bytes": 10**9, "tensors": 7, "evicted_by": "drop_caches", "direct": True}
    machine = {"cpu": "c", "cores": 2, "memory_gib": 1, "disk": "ext4"}
    return {
        "command": "c", "ranks": 2, "rounds": 3, "machine": machine, "versions": {}, "facts": facts, "raw": raw,
        "lines": lines, "replicas": {"replicas": 8, "wanted": 100, "counted": 104, "told": 800, "s": 1.0},
    }  # fmt: skip


def test_a_part_of_the_raw_disk_is_of_rounds_side_by_side() -> None:
    lines = measured((9.0, 1.0), (1.0, 2.0), (2.0, 2.0), (4.0, 5.0))
    assert of_raw(lines, "save") == 0.8
    assert of_raw(lines, "columns") == 0.8
    assert of_raw(measured(), "save") is None


def test_targets_name_the_fastest_rival_and_what_is_missed() -> None:
    ours, slow, fast = measured((1, 1), (1, 1)), measured((1, 9), (1, 9)), measured((1, 1), (1, 0.5))
    result = compared({"dscheck": ours, "torch DCP": slow, "torchsnapshot": fast})
    assert of_best_rival(result, "save") == (0.5, "torchsnapshot")
    verdicts = {target.what: target.verdict for target in targets(result)}
    assert verdicts["save, of raw direct I/O"] == "reached"
    assert verdicts["load, rows → columns, of the fastest rival (torchsnapshot)"] == "missed"
    assert [verdict for what, verdict in verdicts.items() if "replicas" in what] == ["reached", "missed"]


def test_what_failed_is_on_the_page_with_its_reason() -> None:
    failed = [{"who": "contender", "work": "save", "first": False, "failed": "not installed"}]
    text = page(compared({"dscheck": measured((1, 1), (1, 1)), "torchsnapshot": failed}))
    assert "- torchsnapshot, save: not installed" in text
    assert "| save | 1.00 | 1.00 | failed | 1.00 | – |" in text


def test_a_counting_storage_counts_what_is_read(tmp_path: Path) -> None:
    storage = Counting(tmp_path)
    assert storage.put_if_absent("records/1-1.json", bytes(100))
    storage.read("records/1-1.json", 10, 20)
    storage.read_into("records/1-1.json", 50, memoryview(bytearray(50)))
    assert storage.read_bytes == 70


@pytest.mark.usefixtures("one_rank")
def test_one_replica_reads_what_it_wants_and_little_more(tmp_path: Path) -> None:
    found = replicas(tmp_path, gpt_shapes(4 * 10**6), init_device_mesh("cpu", (1,)))
    assert found["replicas"] == 1
    assert found["wanted"] <= found["told"] <= found["counted"] <= 1.05 * found["wanted"]


def test_the_machine_is_described_without_its_name_or_paths(tmp_path: Path) -> None:
    facts = describe(tmp_path)
    assert facts["cores"] >= 1
    assert " on " in facts["disk"] or facts["disk"] == "tmpfs"
    text = json.dumps(facts)
    assert str(tmp_path) not in text
    assert platform.node() not in text


def test_ranks_that_do_not_end_are_ended(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match="did not end within"):
        run_ranks(1, "http.server", ["0", "--bind", "127.0.0.1"], log=tmp_path / "log", timeout_s=0.5)


def test_the_first_traceback_of_a_log_is_shown(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("begins\n" + "Traceback: of the rank\nwhy\n" + "torchrun's own\n" * 100)
    assert trouble(log).startswith("Traceback: of the rank\nwhy\n")
    log.write_text("line\n" * 100 + "last\n")
    assert trouble(log, limit=2) == "line\nlast"


def test_versus_measures_all_and_leaves_nothing_behind(tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    options = ["--gb", "0.003", "--rounds", "1", "--keep-caches", "--only", "dscheck", "--replicas", "0"]
    command = [sys.executable, "-m", "benchmarks.versus", *options, "--dir", str(work), "--out", str(out)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "versus.json").read_text())
    assert {line["work"] for line in result["lines"]["dscheck"]} == {"save", *LEAST_OF_RAW}
    assert all((of_raw(result["lines"]["dscheck"], work) or 0) > 0 for work in LEAST_OF_RAW)
    assert list(work.iterdir()) == []
    assert str(tmp_path) not in (out / "versus.md").read_text() + (out / "versus.json").read_text()
