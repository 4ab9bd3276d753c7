"""Saves and loads through a real S3 server: in parts, with little memory, over a kill of the server, by two jobs."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from dscheck import Checkpointer, SupersededError
from dscheck.errors import StorageError
from dscheck.storage.s3 import S3Storage
from dscheck.testing.servers import JuiceFS, SeaweedFS
from tests.end_to_end.worlds import load, same_bits, save
from tests.storage.s3_proxy import Proxy

pytestmark = pytest.mark.filterwarnings("ignore:dscheck:RuntimeWarning")

MIB = 1 << 20
SIZES = (MIB + 3, 7 * MIB, 11, 9 * MIB + 1, 1, 4 * MIB)
SMALL_PARTS = {"part_bytes": 5 * MIB, "requests_in_flight": 3}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    with SeaweedFS(tmp_path_factory.mktemp("weed")) as server:
        server.make_bucket("ckpt")
        yield server


def opened(server: SeaweedFS | JuiceFS, **options: Any) -> S3Storage:
    return S3Storage(f"ckpt/{uuid.uuid4().hex}", server.options | SMALL_PARTS | options)


def filled(seed: int, sizes: tuple[int, ...] = SIZES) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"t{i}": torch.randint(0, 256, (n,), generator=generator, dtype=torch.uint8) for i, n in enumerate(sizes)}


def empty() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in filled(0).items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert all(same_bits(found[name], tensor) for name, tensor in expected.items())


# 1 MiB pieces never fill a part, 64 MiB are all of it; a region of 8 MiB holds less than two parts.
@pytest.mark.parametrize(
    "settings", [{}, {"host_memory_bytes": 8 * MIB, "piece_bytes": MIB}, {"piece_bytes": 64 * MIB}]
)
def test_what_was_saved_in_parts_is_loaded(server: SeaweedFS, settings: dict[str, int]) -> None:
    storage, found = opened(server), empty()
    save(storage, 1, [filled(1)], **settings)
    load(storage, [found])
    assert_same(found, filled(1))
    assert [*storage.unfinished("")] == []


@pytest.mark.parametrize("settings", [{}, {"host_memory_bytes": 8 * MIB, "piece_bytes": MIB}])
def test_coded_blocks_go_up_in_parts_too(server: SeaweedFS, settings: dict[str, int]) -> None:
    storage, state = opened(server), {"w": torch.randn(5_000_000, generator=torch.Generator().manual_seed(6))}
    found = {"w": torch.zeros(5_000_000)}
    with Checkpointer(storage, state, rng=False, codec="shuffle-zstd", **settings) as ckpt:
        ckpt.save(1).wait(60)
    (size,) = [entry.size for entry in storage.list("steps/") if entry.key.endswith("data-0.bin")]
    assert 10 * MIB < size < 0.95 * state["w"].nbytes
    load(storage, [found])
    assert_same(found, state)


def test_ranks_share_a_bucket_and_another_number_of_them_loads(server: SeaweedFS) -> None:
    storage, found = opened(server), empty()
    save(storage, 3, [filled(2), filled(2)])
    load(storage, [found])
    assert_same(found, filled(2))


def test_a_server_that_is_away_for_a_second_in_a_save_costs_that_second(tmp_path: Path) -> None:
    with SeaweedFS(tmp_path) as server, Proxy(server.endpoint, lambda method, path: "pass") as proxy:
        server.make_bucket("ckpt")
        storage, found, state = opened(server, endpoint_url=proxy.endpoint), empty(), filled(3)
        with Checkpointer(storage, state, rng=False, timeout_s=100) as ckpt:
            ckpt.save(1).wait()
            sent = proxy.sent_bytes
            handle = ckpt.save(2)
            while proxy.sent_bytes < sent + 6 * MIB:
                time.sleep(0.001)
            server.kill()
            assert not handle.done
            time.sleep(1)
            server.start()
            handle.wait()
        load(storage, [found])
        assert_same(found, state)
        assert proxy.arrived_bytes <= 2 * sum(SIZES) + 3 * 5 * MIB + MIB


def test_a_save_that_fails_leaves_no_upload_and_the_step_before(server: SeaweedFS) -> None:
    with Proxy(server.endpoint, lambda method, path: "pass") as proxy:
        storage, found = opened(server, endpoint_url=proxy.endpoint, patience_s=0.5), empty()
        with Checkpointer(storage, filled(4), rng=False, timeout_s=60) as ckpt:
            ckpt.save(1).wait()
            proxy.fate = lambda method, path: "slow down" if "partNumber=3" in path else "pass"
            with pytest.raises(StorageError, match="SlowDown"):
                ckpt.save(2).wait()
            assert [*storage.unfinished("")] == []
            proxy.fate = lambda method, path: "pass"
            ckpt.save(3).wait()
            assert ckpt.steps() == [1, 3]
        load(storage, [found], 1)
        assert_same(found, filled(4))


def test_of_two_jobs_that_save_one_step_at_once_one_commits(server: SeaweedFS) -> None:
    storage, together = opened(server), threading.Barrier(2)

    def run(seed: int) -> BaseException | None:
        with Checkpointer(storage, filled(seed), rng=False, timeout_s=60) as ckpt:
            together.wait()
            handle = ckpt.save(7)
            try:
                handle.wait()
            except SupersededError as error:
                return error
            return None

    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(run, (5, 6)))
    won = [seed for seed, error in zip((5, 6), outcomes, strict=True) if error is None]
    assert len(won) == 1
    found = empty()
    load(storage, [found])
    assert_same(found, filled(won[0]))


def test_a_store_without_conditions_is_found_at_the_first_save(tmp_path: Path) -> None:
    with JuiceFS(tmp_path) as server:
        server.make_bucket("ckpt")
        storage = opened(server)
        with Checkpointer(storage, filled(7), rng=False, timeout_s=60) as ckpt:
            with pytest.raises(StorageError, match="does not honour put-if-absent"):
                ckpt.save(1).wait()
            assert ckpt.latest() is None
