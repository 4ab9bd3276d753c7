from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from dscheck.errors import ConfigError
from dscheck.ranks import Solo, open_ranks
from dscheck.ranks.opening import group_device


def test_without_torch_distributed_there_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert isinstance(open_ranks(1.0), Solo)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert isinstance(open_ranks(1.0), Solo)


def test_a_process_group_of_one_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")  # What the group says counts.
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    try:
        assert isinstance(open_ranks(1.0), Solo)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("size", ["2", "16384", "many"])
def test_several_ranks_without_a_process_group_are_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(ConfigError, match=rf"WORLD_SIZE is {size}.*init_process_group"):
        open_ranks(1.0)


def test_the_protocol_loads_without_torch() -> None:
    code = "import sys; import dscheck.ranks, dscheck.testing.ranks; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize(
    ("backends", "device"),
    [("cpu:gloo,cuda:gloo", "cpu"), ("cpu:gloo,cuda:nccl", "cpu"), ("cuda:nccl", "cuda"), ("xpu:xccl", "xpu")],
)
def test_the_address_travels_on_a_device_that_the_group_can_move(
    monkeypatch: pytest.MonkeyPatch, backends: str, device: str
) -> None:
    monkeypatch.setattr(dist, "get_backend_config", lambda: backends)
    assert group_device().type == device
