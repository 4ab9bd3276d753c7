"""Replicas that load one state: what they read of the storage, against what they want once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from benchmarks.sharded_state import live
from dscheck import Checkpointer
from dscheck.storage import Entry, LocalStorage, ObjectWriter


class Counting:
    """A Storage on a disk that knows how many bytes it was asked for."""

    def __init__(self, root: Path) -> None:
        self._storage = LocalStorage(root)
        self.read_bytes = 0

    @property
    def url(self) -> str:
        return self._storage.url

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return self._storage.put_if_absent(key, data)

    def create(self, key: str) -> ObjectWriter:
        return self._storage.create(key)

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        data = self._storage.read(key, offset, length)
        self.read_bytes += len(data)
        return data

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        self._storage.read_into(key, offset, buffer)
        self.read_bytes += len(buffer)

    def list(self, prefix: str) -> Iterator[Entry]:
        return self._storage.list(prefix)

    def delete(self, key: str) -> None:
        self._storage.delete(key)


def replicas(folder: Path, shapes: dict[str, tuple[int, ...]], mesh: DeviceMesh) -> dict[str, Any]:
    """All ranks save one state, then load it, with all of it on each. What was read, by the storage and the report."""
    state = live(shapes, "whole", mesh)
    state.fill()
    with Checkpointer(folder / "replicas", state.mapping(), rng=False) as ckpt:
        ckpt.save(1).wait()
    state.clear()
    storage = Counting(folder / "replicas")
    began = time.perf_counter()
    with Checkpointer(storage, state.mapping(), rng=False) as ckpt:
        ckpt.load(1)
        assert ckpt.loaded is not None
        seconds, reported = time.perf_counter() - began, ckpt.loaded.bytes_read
    if state.wrong():
        raise ValueError(f"replicas: {len(state.wrong())} tensors differ, '{state.wrong()[0]}' first")
    sums = torch.tensor([storage.read_bytes, reported])
    dist.all_reduce(sums)
    counted, told = sums.tolist()
    return {"replicas": dist.get_world_size(), "wanted": state.nbytes(), "counted": counted, "told": told, "s": seconds}
