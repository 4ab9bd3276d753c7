"""Any number of ranks, each in a forked process of its own, on a process group that moves no bytes.

One process for all would not do: DTensor keeps the mesh of the first rank in its caches.
"""

from __future__ import annotations

import multiprocessing
import pickle
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

T = TypeVar("T")

# Loaded by the first DTensor: here once, not in the process of each rank.
for module in ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"):
    import_module(module)


@contextmanager
def fake_rank(rank: int, world: int) -> Iterator[None]:
    """Inside, this process is `rank` of `world`. Collectives return at once, with nothing in their outputs."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def on_each(world: int, run: Callable[[int], T]) -> list[T]:
    """What `run` returns on every rank of `world`."""

    def initialized(rank: int) -> T:
        with fake_rank(rank, world):
            return run(rank)

    return forked(world, initialized)


def forked(count: int, run: Callable[[int], T]) -> list[T]:
    """What `run` returns in each of `count` processes at once. Raises with the first traceback of one that failed.

    One process may be the same rank of several worlds, one after the other.
    """
    if torch.cuda.is_available():
        pytest.skip("CUDA does not survive a fork: run with CUDA_VISIBLE_DEVICES= to test this")
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    processes = [context.Process(target=_child, args=(rank, run, pipes[rank][1])) for rank in range(count)]
    for process, (_, sender) in zip(processes, pipes, strict=True):
        process.start()
        sender.close()  # so that nothing waits for one that has crashed
    answers = [_answer(receiver) for receiver, _ in pipes]
    for process in processes:
        process.join()
    for rank, (error, _) in enumerate(answers):
        assert error is None, f"rank {rank}, exit code {processes[rank].exitcode}: {error}"
    return [result for _, result in answers]


def _answer(receiver: Any) -> tuple[str | None, Any]:
    try:
        answer: tuple[str | None, Any] = pickle.loads(receiver.recv_bytes())
    except EOFError:
        return "ended without an answer", None
    return answer


def on_rank(rank: int, world: int, run: Callable[[int], T]) -> T:
    """What `run` returns on one rank, without the others."""

    def initialized(_: int) -> T:
        with fake_rank(rank, world):
            return run(rank)

    return forked(1, initialized)[0]


def _child(rank: int, run: Callable[[int], Any], pipe: Any) -> None:
    try:
        pipe.send_bytes(pickle.dumps((None, run(rank))))
    except BaseException:
        pipe.send_bytes(pickle.dumps((traceback.format_exc(), None)))
