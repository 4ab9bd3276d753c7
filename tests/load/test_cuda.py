"""Loads into device memory: through page-locked buffers, without a host copy of the state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dscheck import Checkpointer
from tests.end_to_end.worlds import load, random_bits, same_bits, save

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.bool, torch.complex128, torch.float8_e4m3fn, torch.int64]
SHAPES = [(), (0,), (1,), (300, 700), (7, 1, 33, 2), (3000, 4096)]


def wide(seed: int) -> dict[str, Any]:
    cases = ((dtype, shape) for dtype in DTYPES for shape in SHAPES)
    return {f"t{i}": random_bits(shape, dtype, seed + i) for i, (dtype, shape) in enumerate(cases)}


def test_every_dtype_and_shape_comes_back_on_a_device(tmp_path: Path) -> None:
    saved = wide(1)
    save(tmp_path / "root", 1, [saved], block_bytes=4096)
    live = {name: tensor.cuda() for name, tensor in wide(1000).items()}
    load(tmp_path / "root", [live])
    assert all(same_bits(live[name], saved[name]) for name in saved)


def test_views_of_any_strides_on_a_device_are_written_in_place(tmp_path: Path) -> None:
    saved = random_bits((6, 500, 400), torch.float32, 1)
    around = torch.zeros(8, 502, 900, device="cuda")
    views = {
        "transposed": torch.zeros(400, 500, 6, device="cuda").permute(2, 1, 0),
        "inner": around[1:7, 1:501, 3:803:2],
        "host": torch.zeros(6, 500, 400),
    }
    save(tmp_path / "root", 1, [dict.fromkeys(views, saved)], replicas="first")
    load(tmp_path / "root", [views])
    assert all(same_bits(view.contiguous(), saved) for view in views.values())
    around[1:7, 1:501, 3:803:2] = 0
    assert not around.any()


def test_other_dtypes_are_converted_on_a_device(tmp_path: Path) -> None:
    saved = torch.randn(5000, 3000)
    save(tmp_path / "root", 1, [{"w": saved}])
    live = {"w": torch.zeros(5000, 3000, dtype=torch.bfloat16, device="cuda")}
    load(tmp_path / "root", [live], convert_dtype=True)
    assert torch.equal(live["w"].cpu(), saved.bfloat16())


def test_a_step_under_way_does_not_write_over_what_is_loaded(tmp_path: Path) -> None:
    saved = torch.ones(4096, 4096)
    save(tmp_path / "root", 1, [{"w": saved}])
    live, busy = {"w": torch.zeros(4096, 4096, device="cuda")}, torch.randn(4096, 4096, device="cuda")
    with Checkpointer(tmp_path / "root", live, rng=False) as ckpt:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                busy = busy @ busy
            live["w"].fill_(2.0)
        ckpt.load()
    assert torch.equal(live["w"].cpu(), saved)


def test_a_load_takes_little_device_memory_beside_the_state(tmp_path: Path) -> None:
    saved = {f"w{i}": torch.randn(4096, 4096) for i in range(8)}
    save(tmp_path / "root", 1, [saved])
    live = {name: torch.zeros(4096, 8192, device="cuda")[:, ::2] for name in saved}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    load(tmp_path / "root", [live])
    assert torch.cuda.max_memory_allocated() - before <= 300 << 20
    assert all(torch.equal(live[name].cpu(), saved[name]) for name in saved)
