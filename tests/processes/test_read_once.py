"""What several ranks want is read by one of them and passed on; a rank that fails meanwhile ends the load on all."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from dscheck import Checkpointer
from dscheck.errors import CorruptCheckpointError, DeadlineError, RankFailureError
from dscheck.load import memory, passing, share
from dscheck.storage import LocalStorage
from dscheck.testing import Faulty
from tests.processes.pool import Job, note
from tests.processes.roots import newest

LARGE, SMALL = (1500, 1024), 40
BLOCK = 64 << 10


def weights(seed: int) -> dict[str, torch.Tensor]:
    """About 13 MB in a few large tensors and many small ones of several dtypes."""
    generator = torch.Generator().manual_seed(seed)
    state = {f"large{i}": torch.randn(LARGE, generator=generator) for i in range(2)}
    state["half"] = torch.randn(700, 333, generator=generator).bfloat16()
    return state | {f"small{i}": torch.randn(3 + i, 5, generator=generator) for i in range(SMALL)}


def many_rounds(rank: int, a_host: int) -> None:
    """As a large state has them; as if there were so many ranks on a host."""
    share.PIECE_BYTES = 256 << 10
    share.RECEIVED_BYTES_A_ROUND = 4 << 20
    memory._host = lambda: [str(rank // a_host)]


def replicas(rank: int, root: str, wrapped: bool, a_host: int) -> Any:
    """Load as one of many replicas; what the storage was asked for, and the report."""
    many_rounds(rank, a_host)
    live = weights(1000 + rank)
    live["half"] = live["half"].double()
    storage = Faulty(LocalStorage(root))
    with Checkpointer(storage if wrapped else root, {"w": live}, timeout_s=60.0, rng=False) as ckpt:
        assert ckpt.load(convert_dtype=True) == 1
        report = ckpt.loaded
    assert report is not None
    expected = weights(1)
    assert all(torch.equal(live[name], expected[name]) for name in expected)
    asked = sum(op.nbytes for op in storage.log if op.name in ("read", "read_into"))
    return asked, report


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("read_once") / "root"
    with Checkpointer(root, {"w": weights(1)}, rng=False, block_bytes=BLOCK) as ckpt:
        ckpt.save(1).wait()
    return root


def test_what_eight_replicas_read_of_a_coded_step_is_passed_on_decoded(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "root", {"w": weights(1)}, rng=False, block_bytes=BLOCK, codec="shuffle-zstd") as ckpt:
        ckpt.save(1).wait()
    found = Job(tmp_path / "job", 8, replicas, str(tmp_path / "root"), True, 3).results()
    wanted = sum(tensor.nbytes for tensor in weights(1).values())
    asked = sum(nbytes for nbytes, _ in found)
    for _, report in found:
        assert report.bytes_read_by_all == sum(other.bytes_read for _, other in found)
        assert 0.98 * report.bytes_read_by_all <= asked < 0.95 * wanted
        assert report.bytes_received >= 0.8 * wanted


@pytest.mark.parametrize("a_host", [1, 3, 8], ids=["over the group", "both ways", "through shared memory"])
@pytest.mark.parametrize("wrapped", [True, False], ids=["counting storage", "local files"])
def test_eight_replicas_read_what_they_want_once(root: Path, wrapped: bool, a_host: int, tmp_path: Path) -> None:
    found = Job(tmp_path / "job", 8, replicas, str(root), wrapped, a_host).results()
    wanted = sum(tensor.nbytes for tensor in weights(1).values())
    for _, report in found:
        assert report.bytes == wanted
        assert report.bytes_read_by_all == sum(other.bytes_read for _, other in found) <= 1.05 * wanted
        assert wanted <= report.bytes_wanted_once <= 1.01 * wanted
        assert report.bytes_received >= 0.8 * wanted
        assert report.bytes_read <= 1.3 * wanted / 8
    if wrapped:
        assert sum(asked for asked, _ in found) <= 1.05 * wanted
        for asked, report in found:
            assert 0 <= report.bytes_read - asked < 5000, "objects read whole are logged without their size"


def without_memory(rank: int, root: str) -> Any:
    """One rank of a host gets no memory that it could share."""
    many_rounds(rank, a_host=8)
    if rank == 1:
        os.memfd_create = refuse
    live = weights(1000 + rank)
    with Checkpointer(root, {"w": live}, timeout_s=60.0, rng=False) as ckpt:
        assert ckpt.load() == 1
        report = ckpt.loaded
    expected = weights(1)
    assert all(torch.equal(live[name], expected[name]) for name in expected)
    return report


def refuse(*args: Any) -> int:
    raise OSError(errno.ENOSPC, "no memory")


def test_a_rank_without_memory_to_share_passes_on_over_the_group(root: Path, tmp_path: Path) -> None:
    found = Job(tmp_path / "job", 3, without_memory, str(root)).results()
    wanted = sum(tensor.nbytes for tensor in weights(1).values())
    assert found[0].bytes_read_by_all <= 1.05 * wanted


def columns(rank: int, root: str) -> Any:
    """Load matrices that were saved whole by columns: every rank wants a part of every block (TRAPS 34)."""
    share.PIECE_BYTES = 1 << 20
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    expected = weights(1)
    live = {
        name: DTensor.from_local(
            torch.zeros_like(tensor.chunk(mesh.size(), 1)[rank])
            if rank < len(tensor.chunk(mesh.size(), 1))
            else torch.zeros(tensor.shape[0], 0, dtype=tensor.dtype),
            mesh,
            [Shard(1)],
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )
        for name, tensor in expected.items()
    }
    with Checkpointer(root, {"w": live}, timeout_s=60.0, rng=False) as ckpt:
        assert ckpt.load() == 1
        report = ckpt.loaded
    for name, tensor in expected.items():
        chunks = tensor.chunk(mesh.size(), 1)
        if rank < len(chunks):
            assert torch.equal(live[name].to_local(), chunks[rank]), name
    return report


def test_a_reshard_to_columns_reads_each_block_once(root: Path, tmp_path: Path) -> None:
    found = Job(tmp_path / "job", 3, columns, str(root)).results()
    wanted = sum(tensor.nbytes for tensor in weights(1).values())
    assert found[0].bytes_read_by_all <= 1.05 * wanted
    assert sum(report.bytes for report in found) == wanted


def damaged(rank: int, root: str) -> Any:
    many_rounds(rank, a_host=8)
    live = weights(1000 + rank)
    with Checkpointer(root, {"w": live}, timeout_s=60.0, rng=False) as ckpt:
        try:
            ckpt.load()
        except (RankFailureError, CorruptCheckpointError) as error:
            return error
    return None


def test_a_block_that_one_rank_finds_damaged_ends_the_load_on_all(root: Path, tmp_path: Path) -> None:
    """Of C6: by the name of the rank and with its reason, and nobody waits for a deadline."""
    contents = newest(root)
    path = root / contents.key(0)
    fragment = next(f for f in contents.plan.whole().fragments if f.nbytes > 4 << 20)
    at = fragment.offset + fragment.nbytes // 2
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    try:
        found = Job(tmp_path / "job", 4, damaged, str(root)).results()
    finally:
        path.write_bytes(whole)
    (reader,) = [rank for rank, error in enumerate(found) if isinstance(error, CorruptCheckpointError)]
    for rank, error in enumerate(found):
        if rank != reader:
            assert isinstance(error, RankFailureError)
            assert error.ranks == (reader,)  # type: ignore[attr-defined]
            assert "crc32c" in str(error)


def hanging(rank: int, root: str) -> Any:
    many_rounds(rank, a_host=1)
    with Checkpointer(root, {"w": weights(1000 + rank)}, timeout_s=4.0, rng=False) as ckpt:
        assert ckpt._wire is not None
        if rank == 2:
            ckpt._wire.gather = lambda *args: time.sleep(6.0)  # type: ignore[method-assign, assignment, return-value]
        try:
            ckpt.load()
        except Exception as error:
            return type(error).__name__, str(error)
    return None


def test_nobody_waits_in_the_group_beyond_the_deadline(root: Path, tmp_path: Path) -> None:
    ended = Job(tmp_path / "job", 4, hanging, str(root)).join(40.0)
    for rank in (0, 1, 3):
        name, message = ended[rank].value
        assert name == "DeadlineError"
        assert "over the process group until the deadline" in message


def interrupted(rank: int, root: str, where: str) -> Any:
    """Ctrl-C at rank 1 alone, when it comes to a round, or in the middle of waiting there."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in its background without it
    many_rounds(rank, a_host=8)
    with Checkpointer(root, {"w": weights(1000 + rank)}, timeout_s=60.0, rng=False) as ckpt:
        exchange = ckpt._ranks.exchange

        def struck(round: str, *args: Any, **kwargs: Any) -> bytes:
            if rank == 1 and round.endswith(where):
                ckpt._ranks.exchange = exchange  # type: ignore[method-assign]
                threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
            elif rank == 2 and round.endswith(where):
                time.sleep(1.0)
            return exchange(round, *args, **kwargs)

        ckpt._ranks.exchange = struck  # type: ignore[method-assign]
        if where == "place" and rank == 1:
            passing.Passing.offer = strike  # type: ignore[method-assign]
        began = time.monotonic()
        try:
            ckpt.load()
        except (KeyboardInterrupt, RankFailureError) as error:
            return error, time.monotonic() - began
    return None


def strike(*args: Any) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)


@pytest.mark.parametrize("where", ["decide", "prepared", "place", "pass-1", "done"])
def test_a_rank_that_is_interrupted_ends_the_load_on_all(root: Path, where: str, tmp_path: Path) -> None:
    """At once and by its name, and not at their deadline."""
    found = Job(tmp_path / "job", 4, interrupted, str(root), where).results()
    for rank, (error, seconds) in enumerate(found):
        assert seconds < 20
        if rank == 1:
            assert isinstance(error, KeyboardInterrupt)
        else:
            assert isinstance(error, RankFailureError)
            assert error.ranks == (1,)  # type: ignore[attr-defined]
            assert "KeyboardInterrupt" in str(error)


def stopped(rank: int, root: str) -> Any:
    """Rank 0, with the store, stops where the ranks have agreed on who reads what."""
    many_rounds(rank, a_host=1)
    with Checkpointer(root, {"w": weights(1000 + rank)}, timeout_s=4.0, rng=False) as ckpt:
        exchange = ckpt._ranks.exchange

        def stopping(round: str, *args: Any, **kwargs: Any) -> bytes:
            answer = exchange(round, *args, **kwargs)
            if rank == 0 and round.endswith("shared"):
                os.kill(os.getpid(), signal.SIGSTOP)
            return answer

        ckpt._ranks.exchange = stopping  # type: ignore[method-assign]
        try:
            ckpt.load()
        except DeadlineError as error:
            note("ended")
            return error
    return None


def test_a_store_that_stops_in_a_load_is_named_and_not_the_storage(root: Path, tmp_path: Path) -> None:
    """The others take their time to acknowledge the round, and then have none left for their reads."""
    job = Job(tmp_path / "job", 3, stopped, str(root))
    for rank in (1, 2):
        job.wait_for(rank, "ended")
    job.kill(0)
    ended = job.join()
    for rank in (1, 2):
        error = ended[rank].value
        assert isinstance(error, DeadlineError)
        assert error.ranks == (0,)  # type: ignore[attr-defined]


def killed(rank: int, root: str, agreed: bool) -> Any:
    many_rounds(rank, a_host=1)
    live = weights(1000 + rank)
    with Checkpointer(root, {"w": live}, timeout_s=5.0, rng=False) as ckpt:
        exchange = ckpt._ranks.exchange

        def dying(round: str, *args: Any, **kwargs: Any) -> bytes:
            dies = rank == 2 and round.endswith("pass-1")
            if dies and not agreed:
                os._exit(1)
            answer = exchange(round, *args, **kwargs)
            if dies:
                os._exit(1)
            return answer

        ckpt._ranks.exchange = dying  # type: ignore[method-assign]
        try:
            ckpt.load()
        except Exception as error:
            return type(error).__name__, str(error)
    return None


def test_a_rank_that_dies_before_it_passes_on_is_named_by_all(root: Path, tmp_path: Path) -> None:
    ended = Job(tmp_path / "job", 4, killed, str(root), True).join(40.0)
    for rank in (0, 1, 3):
        name, message = ended[rank].value
        assert name == "RankFailureError"
        assert message.endswith("with rank 2")


def test_a_rank_that_dies_between_rounds_is_named_at_the_deadline(root: Path, tmp_path: Path) -> None:
    ended = Job(tmp_path / "job", 4, killed, str(root), False).join(40.0)
    for rank in (0, 1, 3):
        name, message = ended[rank].value
        assert name == "DeadlineError"
        assert "1 of 4 ranks to arrive: 2" in message
