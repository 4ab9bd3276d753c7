"""Small trainings of every kind: a state to save, a step that changes it, and an image of it to compare with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

WIDTH, HIDDEN = 256, 512
"""A weight of 512 KiB, and 3 MiB with its moments: dozens of pieces of the tests' size."""


@dataclass
class Job:
    """One process that trains. `state` is what is saved, `step` what one iteration does to it."""

    state: dict[str, Any]
    step: Callable[[], None]


HOW = {"foreach", "fused", "capturable", "differentiable"}
"""How a step is computed, which is not stored; torch.compile makes an optimizer capturable."""


def image(value: Any) -> Any:
    """Copies of all tensors in `value` as they are now, wrappers by their inner tensors; plain data copied."""
    if isinstance(value, torch.Tensor):
        if is_traceable_wrapper_subclass(value):
            return {name: image(getattr(value, name)) for name in value.__tensor_flatten__()[0]}
        return value.detach().clone()
    if callable(getattr(value, "state_dict", None)):
        return image(value.state_dict())
    if isinstance(value, Mapping):
        return {key: image(item) for key, item in value.items() if key not in HOW}
    if isinstance(value, list | tuple):
        return [image(item) for item in value]
    return copy.deepcopy(value)


def differences(one: Any, other: Any, at: str = "state") -> list[str]:
    """The paths at which two images differ in a bit, a shape, a dtype, a key or a value."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape and torch.equal(_bytes(one), _bytes(other))
    elif isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [found for key in one for found in differences(one[key], other[key], f"{at}.{key}")]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [found for i, item in enumerate(one) for found in differences(item, other[i], f"{at}.{i}")]
    else:
        same = type(one) is type(other) and one == other
    return [] if same else [at]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8)


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))


def loss_of(model: Callable[[torch.Tensor], torch.Tensor], device: str, rows: int = 4) -> torch.Tensor:
    return model(torch.randn(rows, WIDTH, device=device)).square().mean()


Make = Callable[[Iterable[nn.Parameter]], Any]


def stepped_by(make: Make, device: str, model: nn.Module | None = None) -> Job:
    """Forward, backward, optimizer step."""
    model = (model or layers()).to(device)
    optimizer = make(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model, device).backward()
        optimizer.step()

    return Job({"model": model, "optimizer": optimizer}, step)


def with_closure(device: str) -> Job:
    """LBFGS steps by a closure and replaces its large tensors instead of changing them."""
    model = layers().to(device)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2, history_size=3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, device)
        loss.backward()
        return loss

    return Job({"model": model, "optimizer": optimizer}, lambda: optimizer.step(closure))


class SignMomentum(torch.optim.Optimizer):
    """A hand-written optimizer with a tensor and a plain number as its state."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        super().__init__(params, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                momentum = state.setdefault("momentum", torch.zeros_like(parameter)).lerp_(parameter.grad, 0.1)
                state["seen"] = state.get("seen", 0) + 1
                parameter.sub_(momentum.sign(), alpha=group["lr"])


class Wrapped:
    """An optimizer around another one, as launchers and loss scalers make them."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        self.optimizer = torch.optim.AdamW(params, lr=0.01)

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["optimizer"], name)

    def step(self) -> None:
        self.optimizer.step()


def adamw(**implementation: bool) -> Make:
    return lambda params: torch.optim.AdamW(params, lr=0.01, **implementation)


def momentum(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.01, momentum=0.9)


def compiled(device: str) -> Job:
    """A compiled model and a compiled optimizer step, on a device by a backend that generates code."""
    backend = "inductor" if device == "cuda" else "aot_eager"
    model = torch.compile(layers().to(device), backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=True)
    stepping = torch.compile(optimizer.step, backend=backend)

    def step() -> None:
        optimizer.zero_grad()
        try:
            loss_of(model, device).backward()
            stepping()
        except torch._dynamo.exc.BackendCompilerFailed as error:
            pytest.skip(f"{backend} does not work here: {error}")

    return Job({"model": model, "optimizer": optimizer}, step)


def strided(device: str) -> Job:
    """Parameters and moments in channels_last, transposed, and in a window of a larger tensor."""
    convolution = nn.Conv2d(32, 48, 3, padding=1).to(memory_format=torch.channels_last)
    model = nn.ParameterDict(
        {
            "weight": convolution.weight,
            "transposed": nn.Parameter(torch.randn(HIDDEN, WIDTH).t()),
            "window": nn.Parameter(torch.randn(300, 400)[20:270, 10:390]),
        }
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    def step() -> None:
        for parameter in model.values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()

    return Job({"model": model, "optimizer": optimizer}, step)


def offloaded(device: str) -> Job:
    """Parameters and moments live on the host, where the optimizer steps; the device has working copies."""
    model, working = layers(), layers().to(device)
    if device == "cuda":
        for parameter in model.parameters():
            parameter.data = parameter.data.pin_memory()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)

    def step() -> None:
        for host, copied in zip(model.parameters(), working.parameters(), strict=True):
            copied.data.copy_(host.data, non_blocking=True)
        working.zero_grad()
        loss_of(working, device).backward()
        for host, copied in zip(model.parameters(), working.parameters(), strict=True):
            assert copied.grad is not None
            host.grad = copied.grad.cpu()
        optimizer.step()

    return Job({"model": model, "optimizer": optimizer}, step)
