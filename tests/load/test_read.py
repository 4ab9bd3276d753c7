"""A load reads local files natively and other storages through `read_into`, and neither brings an unverified byte."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from dscheck import Checkpointer
from dscheck.errors import CorruptCheckpointError, DeadlineError, StorageError
from dscheck.ranks.solo import Solo
from dscheck.storage import LocalStorage, MemoryStorage, Storage
from dscheck.storage.base import LocalFiles
from dscheck.testing import Faulty, fail_at, hang
from tests.end_to_end.worlds import load, open_on, random_bits, same_bits, save
from tests.processes.roots import newest

DTYPES = [torch.float32, torch.bfloat16, torch.bool, torch.complex128, torch.float8_e4m3fn, torch.int64, torch.uint8]
SHAPES = [(), (0,), (1,), (5, 0, 3), (300, 700), (7, 1, 33, 2), (1 << 20,)]


def wide(seed: int) -> dict[str, Any]:
    cases = ((dtype, shape) for dtype in DTYPES for shape in SHAPES)
    return {f"t{i}": random_bits(shape, dtype, seed + i) for i, (dtype, shape) in enumerate(cases)}


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return LocalStorage(tmp_path / "root") if request.param == "local" else MemoryStorage()


def test_every_dtype_and_shape_comes_back(storage: Storage) -> None:
    saved, live = wide(1), wide(1000)
    save(storage, 1, [saved], block_bytes=4096)
    report = load(storage, [live])[0]
    assert all(same_bits(live[name], saved[name]) for name in saved)
    assert report.bytes == sum(tensor.nbytes for tensor in saved.values())


def test_live_views_of_any_strides_are_written_in_place(storage: Storage) -> None:
    shape = (6, 50, 40)
    saved = random_bits(shape, torch.float32, 1)
    around = torch.zeros(8, 52, 90)
    views = {
        "transposed": torch.zeros(40, 50, 6).permute(2, 1, 0),
        "inner": around[1:7, 1:51, 3:83:2],
        "channels_last": torch.zeros(6, 40, 50).transpose(1, 2),
    }
    save(storage, 1, [dict.fromkeys(views, saved)], block_bytes=4096, replicas="first")
    load(storage, [views])
    assert all(same_bits(view.contiguous(), saved) for view in views.values())
    around[1:7, 1:51, 3:83:2] = 0
    assert not around.any()


def test_other_dtypes_are_converted_only_when_asked(storage: Storage) -> None:
    saved = torch.randn(500, 300)
    save(storage, 1, [{"w": saved}], block_bytes=4096)
    live = {"w": torch.zeros(300, 500, dtype=torch.bfloat16).t()}
    load(storage, [live], convert_dtype=True)
    assert torch.equal(live["w"], saved.bfloat16())


def test_autograd_sees_that_a_load_has_written(storage: Storage) -> None:
    save(storage, 1, [{"w": torch.ones(5)}])
    live = torch.zeros(5, requires_grad=True)
    product = (live * live).sum()
    load(storage, [{"w": live}])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_a_flipped_bit_of_a_local_file_is_found_and_named(tmp_path: Path) -> None:
    saved = {"w": torch.randn(300, 700)}
    save(tmp_path / "root", 1, [saved], block_bytes=4096)
    contents = newest(tmp_path / "root")
    at = contents.plan.fragments_of(0)[0].offset + 5 * 4096 + 17
    path = tmp_path / "root" / contents.key(0)
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)
    live = {"w": torch.zeros(300, 700)}
    with pytest.raises(CorruptCheckpointError, match=r"fragment 'w' .* stored, 0x.* read from") as caught:
        load(tmp_path / "root", [live])
    assert caught.value.offset == at - 17  # type: ignore[attr-defined]
    assert not torch.equal(live["w"], saved["w"])


def test_faults_of_a_wrapped_local_storage_are_still_met(tmp_path: Path) -> None:
    root = LocalStorage(tmp_path / "root")
    save(root, 1, [{"w": torch.randn(300, 700)}])
    assert isinstance(root, LocalFiles)
    faulty = Faulty(root, fail_at("read_into", "steps/*"))
    assert not isinstance(faulty, LocalFiles)
    with pytest.raises(StorageError, match="injected"):
        load(faulty, [{"w": torch.zeros(300, 700)}])
    assert faulty.count("read_into") == 1


def test_a_read_that_hangs_ends_at_the_deadline_and_writes_nothing_later() -> None:
    root, go = MemoryStorage(), threading.Event()
    save(root, 1, [{"w": torch.ones(100)}])
    live = {"w": torch.zeros(100)}
    with open_on(Solo(), Faulty(root, hang(go, "read_into", "steps/*")), live, timeout_s=0.5) as ckpt:
        with pytest.raises(DeadlineError, match="1 of 1 reads"):
            ckpt.load()
        go.set()
        for thread in threading.enumerate():
            if thread.name.startswith("dscheck-read"):
                thread.join()
        assert not live["w"].any()


def test_a_small_budget_reads_the_same(tmp_path: Path) -> None:
    saved = wide(1)
    save(tmp_path / "root", 1, [saved])
    live = wide(1000)
    with Checkpointer(tmp_path / "root", live, rng=False, read_memory_bytes=1, read_threads=1) as ckpt:
        assert ckpt.load() == 1
    assert all(same_bits(live[name], saved[name]) for name in saved)


def test_a_load_takes_no_more_memory_than_it_may(tmp_path: Path) -> None:
    """Invariant C12: the state is not in memory twice, and as many threads as may be read within the budget."""
    budget, slack = 64 << 20, 32 << 20
    state = {f"w{number}": torch.full((24 << 20,), number, dtype=torch.uint8) for number in range(8)}
    for root, saved in (("small", {"w": torch.ones(3)}), ("root", state)):
        save(tmp_path / root, 1, [saved])
    load(tmp_path / "small", [{"w": torch.zeros(3)}])  # what a first load imports
    with Checkpointer(tmp_path / "root", state, rng=False, read_memory_bytes=budget, read_threads=64) as ckpt:
        Path("/proc/self/clear_refs").write_text("5")  # the most from here on
        before = memory_bytes("VmHWM")
        ckpt.load(1)
        taken = memory_bytes("VmHWM") - before
    assert taken <= budget + slack < sum(tensor.nbytes for tensor in state.values())


def memory_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def test_open_local_has_the_errors_and_link_rules_of_read(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.put_if_absent("a.json", b"12345")
    (tmp_path / "link.json").symlink_to(tmp_path / "a.json")
    with storage.open_local("a.json") as (fd, size):
        assert size == 5
        assert fd >= 0
    with pytest.raises(FileNotFoundError, match=r"there is no .*b\.json"), storage.open_local("b.json"):
        pass
    with pytest.raises(StorageError, match="symbolic link"), storage.open_local("link.json"):
        pass
    with pytest.raises(StorageError, match="no key"), storage.open_local("../a.json"):
        pass
