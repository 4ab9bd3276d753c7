"""The capture on a CUDA device: a side stream, page-locked memory, a fence that holds back the stream, not the CPU."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from dscheck import Checkpointer
from dscheck.errors import TornSnapshotError
from tests.snapshot.test_capture import Training, all_bytes, consume, consumed_beside

pytestmark = pytest.mark.gpu
NUMEL = 4096 * 4096


def training(kind: str = "fused", **settings: object) -> Training:
    """A 64 MB parameter under AdamW on the device, after one step."""
    return Training(kind, NUMEL, "cuda", piece_bytes=4 << 20, **settings)


@pytest.mark.parametrize("spill", ["auto", 0])
@pytest.mark.parametrize("kind", ["fused", "foreach", "plain"])
def test_steps_that_go_on_leave_the_snapshot_bit_exact(kind: str, spill: object) -> None:
    """TRAPS 20, 21: the fence enqueues before it records, and spill memory comes from the driver."""
    job = training(kind, device_memory_bytes=spill)
    job.extra = [torch.randn(1000, 1000, device="cuda"), torch.randn(64, 3000, device="cuda").t()]
    for _ in range(5):
        expected = all_bytes(job.locals())
        capture = job.capture()
        for _ in range(3):
            job.step()
        job.extra[0].mul_(1.5)
        capture.wait()
        assert consume(capture, len(expected)) == expected
        job.end(capture)


def test_a_region_smaller_than_the_state_passes_it_through() -> None:
    job = training(host_memory_bytes=32 << 20)
    for _ in range(3):
        expected = all_bytes(job.locals())
        capture = job.begin()
        assert consumed_beside(capture, len(expected), job.step) == expected
        capture.wait()
        job.end(capture)


def test_the_fence_does_not_block_the_cpu_for_the_copies() -> None:
    job = training()
    for _ in range(2):
        capture = job.capture()
        capture.wait()
        job.end(capture)
    torch.cuda.synchronize()
    capture = job.capture()
    torch.cuda._sleep(2_000_000_000)  # about a second of device time before anything later on the training stream
    began = time.perf_counter()
    job.step()
    assert time.perf_counter() - began < 0.3
    capture.wait()


def test_a_change_behind_the_fence_is_refused() -> None:
    job = training(device_memory_bytes=0)
    first = job.capture()
    first.wait()
    capture = job.begin()
    job.weight.data.mul_(1.01)
    consume(first, len(job.locals()))
    with pytest.raises(TornSnapshotError):
        capture.wait()


def test_training_at_the_edge_of_memory_never_fails_for_a_save() -> None:
    """TRAPS 21: spill memory is what the driver has left beside a reserve, and none when that is not there."""
    job = training()
    job.step()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(free - (3 << 29), dtype=torch.uint8, device="cuda")
    for _ in range(4):
        expected = all_bytes(job.locals())
        capture = job.capture()
        held = torch.ones(1 << 28, device="cuda")  # 1 GiB, as a forward pass needs it
        job.step()
        del held
        capture.wait()
        assert consume(capture, len(expected)) == expected
        job.end(capture)
    assert job.capturer._copier.spill_bytes(0) == 0
    del ballast


def test_the_region_is_page_locked() -> None:
    job = training()
    job.capture().wait()
    assert job.capturer._copier.page_locked


def test_a_checkpoint_of_the_device_loads_on_the_cpu_and_back(tmp_path: Path) -> None:
    def model(device: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        module = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.BatchNorm1d(200), torch.nn.Linear(200, 7)).to(
            device
        )
        return module, torch.optim.AdamW(module.parameters(), fused=True)

    module, optimizer = model("cuda")
    for _ in range(3):
        module(torch.randn(8, 300, device="cuda")).sum().backward()
        optimizer.step()
    with Checkpointer(tmp_path, {"m": module, "o": optimizer}) as ckpt:
        ckpt.save(3)
        expected = {name: value.cpu().clone() for name, value in module.state_dict().items()}
        after_save = torch.cuda.get_rng_state()
        optimizer.step()
    for device in ("cpu", "cuda"):
        fresh, fresh_optimizer = model(device)
        with Checkpointer(tmp_path, {"m": fresh, "o": fresh_optimizer}) as ckpt:
            assert ckpt.load() == 3
        assert all(torch.equal(value.cpu(), expected[name]) for name, value in fresh.state_dict().items())
        moments = fresh_optimizer.state[next(fresh.parameters())]
        assert moments["exp_avg"].device.type == device
        assert torch.equal(torch.cuda.get_rng_state(), after_save)
