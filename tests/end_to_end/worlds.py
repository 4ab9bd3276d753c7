"""Jobs of N ranks as threads of this process, over any storage: the whole of dscheck but the process group."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from dscheck import Checkpointer
from dscheck.ranks.base import Ranks
from dscheck.storage import MemoryStorage, Storage
from dscheck.testing.ranks import run_ranks, thread_ranks

T = TypeVar("T")


def fresh() -> Storage:
    """A memory storage that nobody else has."""
    return MemoryStorage(uuid.uuid4().hex)


def outcomes(n: int, fn: Callable[[Ranks], T], timeout: float = 60.0) -> list[T | BaseException]:
    """Per rank what `fn` returned or raised."""
    return run_ranks(n, fn, timeout=timeout, ranks=thread_ranks(n))


def job(n: int, fn: Callable[[Ranks], T], timeout: float = 60.0) -> list[T]:
    """What `fn` returned on each of n ranks; the first error is raised."""
    found = outcomes(n, fn, timeout)
    for outcome in found:
        if isinstance(outcome, BaseException):
            raise outcome
    return found  # type: ignore[return-value]


def open_on(ranks: Ranks, root: Any, state: Mapping[str, Any], **settings: Any) -> Checkpointer:
    """A Checkpointer of one rank, with a deadline that a test can wait for."""
    return Checkpointer(root, state, ranks=ranks, **{"timeout_s": 30.0, "rng": False, **settings})


def save(root: Any, step: int, states: list[dict[str, Any]], **settings: Any) -> None:
    """Save `states`, one a rank, as `step`; loads first what is there."""

    def run(ranks: Ranks) -> None:
        with open_on(ranks, root, states[ranks.rank], fresh=True, **settings) as ckpt:
            ckpt.save(step).wait()

    job(len(states), run)


def load(root: Any, states: list[dict[str, Any]], step: int | None = None, **how: Any) -> list[Any]:
    """Load into `states`, one a rank; the reports."""

    def run(ranks: Ranks) -> Any:
        with open_on(ranks, root, states[ranks.rank]) as ckpt:
            ckpt.load(step, **how)
            return ckpt.loaded

    return job(len(states), run)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal shape, dtype and bytes."""

    def raw(tensor: torch.Tensor) -> bytes:
        flat = tensor.detach().cpu().contiguous().view(-1)
        return bytes(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else b""

    return one.shape == other.shape and one.dtype == other.dtype and raw(one) == raw(other)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """A tensor of any dtype with random bits in it (bool: 0 and 1)."""
    generator = torch.Generator().manual_seed(seed)
    numel = int(torch.Size(shape).numel())
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 256, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(shape) if numel else torch.empty(shape, dtype=dtype)
