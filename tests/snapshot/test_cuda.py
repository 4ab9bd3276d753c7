"""The capture on a CUDA device: a side stream, page-locked memory, a fence that holds back the stream, not the CPU."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from dscheck import Checkpointer
from dscheck.errors import TornSnapshotError
from dscheck.snapshot import Arena, Capture, Fences, Lanes, Source

pytestmark = pytest.mark.gpu

KINDS = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "plain": {"foreach": False},
    "capturable": {"capturable": True},
}


class Training:
    """A 64 MB parameter under AdamW on the device, after one step."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(4096, 4096, device="cuda"))
        self.optimizer = torch.optim.AdamW([self.weight], lr=0.1, **KINDS[kind])  # type: ignore[arg-type]
        self.fences, self.arena, self.lanes = Fences(), Arena(), Lanes()
        self.fences.watch([self.optimizer])
        self.step()

    def step(self) -> None:
        self.weight.grad = torch.randn_like(self.weight)
        self.optimizer.step()

    def views(self) -> list[torch.Tensor]:
        return [self.weight.detach(), *self.optimizer.state[self.weight].values()]

    def capture(self) -> Capture:
        sources = [Source(str(i), view, self.optimizer) for i, view in enumerate(self.views())]
        deadline = time.monotonic() + 30
        capture = Capture(sources, self.arena, self.lanes, self.fences.steps, piece_bytes=4 << 20, deadline=deadline)
        self.fences.guard(capture)
        return capture


@pytest.mark.parametrize("kind", KINDS)
def test_steps_that_go_on_leave_the_snapshot_bit_exact(kind: str) -> None:
    training = Training(kind)
    for _ in range(5):
        expected = [view.clone() for view in training.views()]
        capture = training.capture()
        for _ in range(3):
            training.step()
        capture.run()
        for index, want in enumerate(expected):
            got = capture.data(index).view(want.dtype).view(want.shape)
            assert torch.equal(got, want.cpu())


def test_the_fence_does_not_block_the_cpu_for_the_copies() -> None:
    training = Training("fused")
    training.capture().run()  # the region is allocated and page-locked once
    torch.cuda.synchronize()
    capture = training.capture()
    torch.cuda._sleep(2_000_000_000)  # about a second of device time before any copy of the compute stream could start
    began = time.perf_counter()
    training.step()
    assert time.perf_counter() - began < 0.3
    capture.run()


def test_a_change_behind_the_fence_is_refused() -> None:
    training = Training("fused")
    capture = training.capture()
    training.weight.data.mul_(1.01)
    with pytest.raises(TornSnapshotError):
        capture.run()


def test_a_step_behind_removed_hooks_is_refused() -> None:
    training = Training("fused")
    capture = training.capture()
    training.fences.remove()
    training.step()
    with pytest.raises(TornSnapshotError):
        capture.run()


def test_the_region_is_page_locked() -> None:
    training = Training("fused")
    capture = training.capture()
    capture.run()
    assert capture.data(0).is_pinned()


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
