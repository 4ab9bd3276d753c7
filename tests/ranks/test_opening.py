from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from dscheck.errors import ConfigError
from dscheck.ranks import Solo, open_ranks
from dscheck.ranks.board import BoardLostError
from dscheck.ranks.store import StoreBoard, StoreRanks, host_store


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


def test_another_jobs_store_is_not_taken_for_ours() -> None:
    server = host_store(0, "theirs")
    board = StoreBoard(["localhost"], server.port, "ours")
    ranks = StoreRanks(1, 2, board)
    with pytest.raises(BoardLostError, match="another job's store listens there"):
        board.put("key", b"", time.monotonic() + 5)
    ranks.close()


def test_the_first_host_that_leads_to_the_store_is_taken() -> None:
    server = host_store(0, "ours")
    board = StoreBoard(["no-such-host.invalid", "localhost"], server.port, "ours", server)
    board.put("key", b"value", 0.0)
    assert board.look("key", 0.0) == b"value"
    board.close()
