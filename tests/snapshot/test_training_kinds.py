"""Invariant C11 for every kind of training: what is committed is the state at `save()`, whatever training does next."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

from dscheck import Checkpointer
from tests.forkserver import CONTEXT
from tests.snapshot import training
from tests.snapshot.training import Job, adamw, differences, image, layers, loss_of, momentum, stepped_by

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PIECE_BYTES = 64 << 10


def by(make: training.Make) -> Callable[[str], Job]:
    return lambda device: stepped_by(make, device)


KINDS: dict[str, Callable[[str], Job]] = {
    "fused": by(adamw(fused=True)),
    "foreach": by(adamw(foreach=True)),
    "plain": by(adamw(foreach=False, fused=False)),
    "sgd": by(momentum),
    "adagrad": by(lambda params: torch.optim.Adagrad(params, lr=0.01)),
    "hand-written": by(training.SignMomentum),
    "wrapped": by(training.Wrapped),
    "lbfgs": training.with_closure,
    "compiled": training.compiled,
    "strided": training.strided,
    "offloaded": training.offloaded,
}


class Saving:
    """A job with a Checkpointer on it, and the images of its state at the moment of each save."""

    def __init__(self, root: Any, job: Job) -> None:
        self.root, self.job, self.images = root, job, dict[int, Any]()
        self.ckpt = Checkpointer(root, job.state, piece_bytes=PIECE_BYTES)
        self.steps = 0

    def train(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.job.step()
            self.steps += 1

    def save(self) -> Any:
        """The image is taken first, so that nothing lies between `save()` and what the test does next."""
        self.images[self.steps] = image(self.job.state)
        return self.ckpt.save(self.steps)

    def check(self, fresh: Job) -> None:
        """Every save has committed the image of its moment, as a fresh job sees it."""
        self.ckpt.close()
        with Checkpointer(self.root, fresh.state) as reader:
            assert reader.steps() == list(self.images)
            for step, expected in self.images.items():
                reader.load(step)
                assert differences(expected, image(fresh.state)) == [], step


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_saves_on_random_steps_commit_the_state_of_their_moment(kind: str, device: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    saving = Saving(tmp_path, KINDS[kind](device))
    chosen = set(random.Random(kind).sample(range(1, 9), 3))
    for step in range(1, 10):
        saving.train()
        if step in chosen:
            saving.save()
    torch.manual_seed(2)
    saving.check(KINDS[kind](device))


@pytest.mark.parametrize("device", DEVICES)
def test_a_compiled_step_is_not_compiled_anew_for_a_save(device: str, tmp_path: Path) -> None:
    """The compiler sees that there are hooks, and nothing of what they do."""
    saving = Saving(tmp_path, training.compiled(device))
    saving.train()
    saving.save()
    saving.train(2)
    frames = torch._dynamo.utils.counters["frames"]
    before = frames["total"]
    for _ in range(3):
        saving.save()
        saving.train(2)
    assert frames["total"] == before
    saving.check(training.compiled(device))


@pytest.mark.gpu
def test_capturable_adamw_commits_the_state_of_its_moment(tmp_path: Path) -> None:
    saving = Saving(tmp_path, stepped_by(adamw(capturable=True), "cuda"))
    for _ in range(3):
        saving.train(2)
        saving.save()
    saving.train()
    saving.check(stepped_by(adamw(capturable=True), "cuda"))


@pytest.mark.gpu
def test_a_replayed_cuda_graph_after_the_fence_leaves_the_save_as_it_was(tmp_path: Path) -> None:
    """No hook fires in a replay: the loop calls `ckpt.fence()` before it."""
    job = stepped_by(adamw(capturable=True), "cuda")
    model, optimizer = job.state["model"], job.state["optimizer"]
    data = torch.randn(4, training.WIDTH, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            job.step()
    torch.cuda.current_stream().wait_stream(side)
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(data).square().mean().backward()
        optimizer.step()
    saving = Saving(tmp_path, Job(job.state, graph.replay))
    for _ in range(4):
        data.normal_()
        saving.ckpt.fence()
        saving.train()
        saving.save()
    saving.ckpt.fence()
    saving.train()
    saving.check(stepped_by(adamw(capturable=True), "cuda"))


@pytest.mark.parametrize("device", DEVICES)
def test_a_save_between_micro_batches_has_the_state_before_their_step(device: str, tmp_path: Path) -> None:
    def accumulating() -> Job:
        model = layers().to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        batches = iter(range(10**6))

        def micro_batch() -> None:
            loss_of(model, device).div(4).backward()
            if next(batches) % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()

        return Job({"model": model, "optimizer": optimizer}, micro_batch)

    saving = Saving(tmp_path, accumulating())
    saving.train(6)
    saving.save()
    saving.train(3)
    saving.save()
    saving.train(4)
    saving.check(accumulating())


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_that_the_scaler_skips_does_no_harm_to_the_save_before_it(device: str, tmp_path: Path) -> None:
    """No hook fires when gradients overflow, and nothing is changed but the scale (TRAPS 15)."""

    def scaled() -> Job:
        model = layers().to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler(device, init_scale=1024.0, growth_interval=2)
        count = iter(range(10**6))

        def step() -> None:
            optimizer.zero_grad()
            loss = loss_of(model, device)
            scaler.scale(loss * float("inf") if next(count) == 3 else loss).backward()
            scaler.step(optimizer)
            scaler.update()

        return Job({"model": model, "optimizer": optimizer, "scaler": scaler}, step)

    saving = Saving(tmp_path, scaled())
    saving.train(3)
    saving.save()
    saving.train()  # skipped: the scale is halved
    saving.save()
    saving.train(2)
    scales = [saved["scaler"]["scale"] for saved in saving.images.values()]
    assert scales[1] == scales[0] / 2
    saving.check(scaled())


def averaged(device: str) -> tuple[Job, nn.Module, nn.Module]:
    """AdamW and an exponential moving average of its model, updated after each step."""
    job = stepped_by(adamw(fused=True), device, nn.Sequential(nn.Linear(training.WIDTH, 2048), nn.GELU()))
    model, average = job.state["model"], nn.Sequential(nn.Linear(training.WIDTH, 2048)).to(device).requires_grad_(False)
    optimize = job.step

    def step() -> None:
        optimize()
        for old, new in zip(average.parameters(), model.parameters(), strict=True):
            old.lerp_(new.detach(), 0.1)

    return Job({**job.state, "average": average}, step), model, average


@pytest.mark.parametrize("device", DEVICES)
def test_an_average_that_follows_each_step_is_saved_as_it_was(device: str, tmp_path: Path) -> None:
    """A copy that no optimizer owns, of more than 1 MiB, changed soon after `save()` (TRAPS 6)."""
    saving = Saving(tmp_path, averaged(device)[0])
    for _ in range(3):
        saving.train()
        saving.save()
    saving.train()
    saving.check(averaged(device)[0])


@pytest.mark.parametrize("device", DEVICES)
def test_weights_swapped_for_an_evaluation_behind_the_fence_are_saved_as_they_were(device: str, tmp_path: Path) -> None:
    """Model and average change places right after `save()` (TRAPS 18)."""
    job, model, average = averaged(device)

    def swap() -> None:
        for one, other in zip(average.parameters(), model.parameters(), strict=True):
            kept = one.detach().clone()
            one.data.copy_(other.data)
            other.data.copy_(kept)

    saving = Saving(tmp_path, job)
    for _ in range(3):
        saving.train()
        saving.save()
        saving.ckpt.fence()
        swap()
        with torch.no_grad():
            loss_of(model, device)
        saving.ckpt.fence()
        swap()
    saving.check(averaged(device)[0])


def adapted(device: str, base: int = 2048) -> tuple[Job, nn.Parameter]:
    """LoRA: a frozen base weight that no optimizer has, and two small factors that are trained."""
    model = nn.ParameterDict(
        {
            "base": nn.Parameter(torch.randn(base, base), requires_grad=False),
            "down": nn.Parameter(torch.randn(8, base)),
            "up": nn.Parameter(torch.zeros(base, 8)),
        }
    ).to(device)
    optimizer = torch.optim.AdamW([model["down"], model["up"]], lr=0.01)

    def step() -> None:
        optimizer.zero_grad()
        x = torch.randn(2, base, device=device)
        (x @ model["base"] + x @ model["down"].t() @ model["up"].t()).square().mean().backward()
        optimizer.step()

    return Job({"model": model, "optimizer": optimizer}, step), model["base"]


@pytest.mark.parametrize("device", DEVICES)
def test_a_frozen_base_is_saved_with_its_adapters(device: str, tmp_path: Path) -> None:
    """The base is in no optimizer group (TRAPS 6)."""
    saving = Saving(tmp_path, adapted(device)[0])
    for _ in range(2):
        saving.train(2)
        saving.save()
    saving.train()
    saving.check(adapted(device)[0])


@pytest.mark.parametrize("device", DEVICES)
def test_an_embedding_that_its_forward_rewrites_is_saved_as_it_was(device: str, tmp_path: Path) -> None:
    """max_norm renormalizes the rows that a forward looks up, right after `save()` (TRAPS 18)."""

    def embedding() -> Job:
        model = nn.Embedding(3000, 128, max_norm=1.0).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

        def step() -> None:
            optimizer.zero_grad()
            model(torch.randint(0, 3000, (500,), device=device)).square().mean().backward()
            optimizer.step()

        return Job({"model": model, "optimizer": optimizer}, step)

    saving = Saving(tmp_path, embedding())
    for _ in range(3):
        saving.train()
        saving.save()
        before = saving.job.state["model"].weight.detach().clone()
        saving.job.state["model"](torch.arange(3000, device=device))
        assert not torch.equal(before, saving.job.state["model"].weight)
    saving.check(embedding())


@pytest.mark.parametrize("device", DEVICES)
def test_running_statistics_that_a_forward_moves_are_saved_as_they_were(device: str, tmp_path: Path) -> None:
    """BatchNorm writes its buffers in forward, and moves no version counter (TRAPS 17)."""

    def normalized() -> Job:
        model = nn.Sequential(nn.Linear(training.WIDTH, 300), nn.BatchNorm1d(300))
        return stepped_by(adamw(fused=True), device, model)

    saving = Saving(tmp_path, normalized())
    for _ in range(3):
        saving.train()
        saving.save()
        saving.job.state["model"](torch.randn(8, training.WIDTH, device=device))
    saving.train()
    saving.check(normalized())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_quantized_moments_commit_the_state_of_their_moment(name: str, device: str, tmp_path: Path) -> None:
    """They are wrapper subclasses, whose inner tensors a step changes (TRAPS 12)."""
    make = getattr(pytest.importorskip("torchao.optim"), name)
    with torch.compiler.set_stance("force_eager"):  # each step would compile for half a minute
        saving = Saving(tmp_path, stepped_by(make, device))
        for _ in range(3):
            saving.train()
            saving.save()
        saving.train()
        fresh = stepped_by(make, device)
        fresh.step()
        saving.check(fresh)


def train_fully_sharded(root: Path, device: str) -> None:
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)

    def sharded() -> Job:
        model = layers().to(device)
        mesh, policy = init_device_mesh(device, (1,)), CPUOffloadPolicy(pin_memory=device == "cuda")
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh, offload_policy=policy)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=True)

        def step() -> None:
            optimizer.zero_grad()
            loss_of(model, device).backward()
            optimizer.step()

        return Job({"model": model, "optimizer": optimizer}, step)

    saving = Saving(root, sharded())
    for _ in range(3):
        saving.train()
        saving.save()
    saving.train()
    assert {parameter.device.type for parameter in saving.job.state["model"].parameters()} == {"cpu"}
    saving.check(sharded())
    dist.destroy_process_group()


@pytest.mark.parametrize("device", DEVICES)
def test_fully_sharded_state_on_the_host_is_saved_as_it_was(device: str, tmp_path: Path) -> None:
    """FSDP2 with CPU offload: DTensors whose local tensors, gradients and moments lie on the host.

    In a process of its own: DTensor's caches know the mesh for the rest of a process, its forks included.
    """
    with CONTEXT.Pool(1, maxtasksperchild=1) as pool:
        pool.apply_async(train_fully_sharded, (tmp_path, device)).get(timeout=120)
