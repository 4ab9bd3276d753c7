"""Saves with a codec, read back in every way: the same bits, whatever was stored."""

from __future__ import annotations

import errno
import json
import time
from pathlib import Path

import pytest
import torch

from dscheck import Checkpointer, sharded
from dscheck.errors import ConfigError, StorageError
from dscheck.ranks.base import Ranks
from dscheck.save import coded, write
from dscheck.storage import LocalStorage
from dscheck.testing import Faulty, fail_at
from dscheck.testing.faults import Fault, Operation, Proceed
from tests.end_to_end.worlds import fresh, job, load, open_on, same_bits
from tests.manifest import plain_reader

CODECS = ("none", "zstd", "shuffle-zstd")


def state(seed: int) -> dict[str, torch.Tensor]:
    """Tensors of all widths: alike, random, short, scalar, empty, strided, and of several blocks."""
    random = torch.Generator().manual_seed(seed)
    weights = torch.randn(300, 1000, generator=random) * 0.02
    return {
        "bf16": weights.bfloat16(),
        "fp32": weights,
        "fp64": weights[:50].double(),
        "complex": torch.complex(weights[:20], weights[20:40]),
        "zeros": torch.zeros(500_000),
        "noise": torch.randint(0, 256, (300_000,), dtype=torch.uint8, generator=random),
        "tokens": torch.arange(40_000),
        "strided": weights.clone().t(),
        "short": torch.ones(3),
        "scalar": torch.tensor(float(seed)),
        "empty": torch.empty(0, 5),
        "flags": weights > 0,
    }


@pytest.mark.parametrize("codec", CODECS)
def test_what_is_saved_with_a_codec_comes_back_bit_for_bit(tmp_path: Path, codec: str) -> None:
    saved, live = state(1), state(2)
    with Checkpointer(str(tmp_path), {"state": saved}, rng=False, codec=codec, block_bytes=16384) as ckpt:
        ckpt.save(1).wait(60)
    with Checkpointer(str(tmp_path), {"state": live}, rng=False) as ckpt:
        assert ckpt.load() == 1
    for name, tensor in saved.items():
        assert torch.equal(tensor, live[name]), name
    found = plain_reader.read(tmp_path)
    assert found.record["requires"] == ([] if codec == "none" else ["codec"])
    for name, tensor in saved.items():
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        if f"state.{name}" in found.tensors:
            assert found.tensors[f"state.{name}"][1].tobytes() == raw, name


WHOLE = torch.randn(96, 5000, generator=torch.Generator().manual_seed(5)).bfloat16()


def cut(rank: int, ranks: int, source: torch.Tensor) -> dict[str, object]:
    """This rank's columns, declared as such, and as they are."""
    width = source.shape[1] // ranks
    mine = source[:, rank * width : (rank + 1) * width].contiguous()
    return {"w": sharded(mine, tuple(source.shape), (0, rank * width)), "local": mine}


def save_by(root: object, codecs: list[str]) -> None:
    """Each rank by a codec of its own."""

    def run(ranks: Ranks) -> None:
        shard = cut(ranks.rank, ranks.size, WHOLE)["w"]
        with open_on(ranks, root, {"w": shard}, codec=codecs[ranks.rank], block_bytes=8192) as ckpt:
            ckpt.save(1).wait()

    job(len(codecs), run)


@pytest.mark.parametrize(
    "codecs", [["zstd"], ["shuffle-zstd"] * 2, ["none", "shuffle-zstd", "zstd", "none"]], ids=["1", "2", "4, mixed"]
)
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_a_coded_step_is_resharded(codecs: list[str], ranks: int) -> None:
    root, live = fresh(), [cut(rank, ranks, torch.zeros_like(WHOLE)) for rank in range(ranks)]
    save_by(root, codecs)
    load(root, [{"w": state["w"]} for state in live])
    for rank, state in enumerate(live):
        assert same_bits(state["local"], cut(rank, ranks, WHOLE)["local"])


def test_part_of_a_coded_tensor_is_read_alone(tmp_path: Path) -> None:
    """A slice takes the blocks that hold it, as they are stored."""
    save_by(str(tmp_path), ["shuffle-zstd"])
    storage, rows = Faulty(LocalStorage(str(tmp_path))), torch.zeros(2, 5000, dtype=torch.bfloat16)
    with Checkpointer(storage, {"w": sharded(rows, tuple(WHOLE.shape), (40, 0))}, rng=False) as ckpt:
        ckpt.load()
        report = ckpt.loaded
    assert same_bits(rows, WHOLE[40:42])
    (read,) = [op for op in storage.log if op.name == "read_into"]
    assert read.nbytes < rows.nbytes + 2 * 8192  # the raw blocks take 32,768 bytes at least
    assert report is not None
    assert read.nbytes < report.bytes_read


def test_a_file_without_blocks_is_a_plain_one(tmp_path: Path) -> None:
    """format F111"""
    with Checkpointer(str(tmp_path), {"n": 7, "empty": torch.empty(0)}, rng=False, codec="zstd") as ckpt:
        ckpt.save(1).wait(60)
    assert plain_reader.read(tmp_path).record["requires"] == []


@pytest.mark.parametrize("value", ["lz4", "", None, 3])
def test_an_unknown_codec_is_refused_with_those_that_are_known(tmp_path: Path, value: object) -> None:
    with pytest.raises(ConfigError, match="codec="):
        Checkpointer(str(tmp_path), {}, codec=value)


def test_a_codec_does_not_make_a_new_plan(tmp_path: Path) -> None:
    """The file says how its blocks are stored, so that saves with and without codecs share a plan."""
    live = state(1)
    with Checkpointer(str(tmp_path), live, rng=False) as ckpt:
        ckpt.save(1).wait(60)
    with Checkpointer(str(tmp_path), live, rng=False, codec="zstd") as ckpt:
        ckpt.load()
        ckpt.save(2).wait(60)
        live["fp32"].add_(1)
        ckpt.save(3).wait(60)
    plans = sorted(path.name.partition("-") for path in tmp_path.glob("plans/*"))
    assert [term for term, _, _ in plans] == ["1", "2"]
    assert plans[0][2] == plans[1][2]


@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.filterwarnings("ignore:dscheck:RuntimeWarning")
def test_a_write_of_coded_blocks_that_fails_leaves_the_step_before(nth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coded, "BATCH_BYTES", 1 << 20)
    monkeypatch.setattr(write, "JOINED_BYTES", 1)
    inner, saved, live = fresh(), state(1), state(2)
    storage = Faulty(inner, fail_at("write", "steps/2/*", nth=nth, error=errno.ENOSPC))
    with Checkpointer(storage, {"state": saved}, rng=False, codec="shuffle-zstd") as ckpt:
        ckpt.save(1).wait(60)
        with pytest.raises(StorageError):
            ckpt.save(2).wait(60)
        ckpt.save(3).wait(60)
    with Checkpointer(inner, {"state": live}, rng=False) as ckpt:
        assert ckpt.steps() == [1, 3]
        assert ckpt.load() == 3
    assert all(same_bits(live[name], tensor) for name, tensor in saved.items())


def test_a_read_of_coded_blocks_that_fails_fails_the_load() -> None:
    inner = fresh()
    save_by(inner, ["shuffle-zstd"])
    storage = Faulty(inner, fail_at("read_into", "steps/*", error=errno.EIO))
    live = sharded(torch.zeros_like(WHOLE), tuple(WHOLE.shape), (0, 0))
    with Checkpointer(storage, {"w": live}, rng=False) as ckpt, pytest.raises(StorageError):
        ckpt.load()


def test_a_budget_below_the_state_serves_coded_saves_and_loads(tmp_path: Path) -> None:
    """Memory of the capture is given back batch by batch, and reads have a budget too."""
    saved, live = torch.randn(6_000_000), torch.zeros(6_000_000)
    with Checkpointer(
        str(tmp_path),
        {"w": saved},
        rng=False,
        codec="shuffle-zstd",
        host_memory_bytes=8 << 20,
        piece_bytes=1 << 20,
    ) as ckpt:
        ckpt.save(1).wait(60)
    with Checkpointer(str(tmp_path), {"w": live}, rng=False, read_memory_bytes=1) as ckpt:
        ckpt.load()
    assert same_bits(saved, live)


def test_auto_tries_what_it_measured_and_every_save_loads(tmp_path: Path) -> None:
    saved = state(3)
    storage = Faulty(LocalStorage(str(tmp_path)), slow_link(2e6))
    with Checkpointer(storage, {"state": saved}, rng=False, codec="auto") as ckpt:
        for step in range(1, 5):
            saved["scalar"].fill_(step)
            ckpt.save(step).wait(60)
    requires = [json.loads((tmp_path / f"records/{step}-1.json").read_text())["requires"] for step in range(1, 5)]
    assert requires == [[], [], ["codec"], ["codec"]]
    for step in range(1, 5):
        live = state(4)
        with Checkpointer(str(tmp_path), {"state": live}, rng=False) as ckpt:
            ckpt.load(step)
        saved["scalar"].fill_(step)
        assert all(same_bits(live[name], tensor) for name, tensor in saved.items())


def slow_link(bytes_s: float) -> Fault:
    def wait(operation: Operation, proceed: Proceed) -> object:
        if operation.name == "write":
            time.sleep(operation.nbytes / bytes_s)
        return proceed(operation)

    return wait
