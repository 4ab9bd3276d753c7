"""Who saves and loads in the comparison, each through what its users call."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from benchmarks.raw_disk import read_direct, write_direct
from benchmarks.sharded_state import Live
from dscheck import Checkpointer


@dataclass(frozen=True, slots=True)
class Saved:
    """Seconds on this rank since save was called: when it returned, tensors could change, the step existed."""

    returned: float
    free: float
    durable: float


class Contender(Protocol):
    """One way to save and load below a folder of its own. All calls are made by all ranks together."""

    name: str

    def save(self, step: int) -> Saved:
        """Save the state it was made with, durably."""

    def load(self, step: int, into: Live) -> float:
        """Fill `into`, and return how many bytes were read for each byte wanted; 0 when it does not say."""

    def remove(self, step: int) -> None:
        """Free the disk of what `save` made. Called on one rank."""

    def close(self) -> None: ...


class RawDisk:
    """As many bytes as the state has, past the page cache; what is loaded is not looked at."""

    name = "raw disk"

    def __init__(self, folder: Path, state: Live) -> None:
        folder.mkdir(exist_ok=True)
        self._folder, self._path, self._nbytes = folder, folder / f"{dist.get_rank()}.bin", state.nbytes()
        self.direct = True

    def save(self, step: int) -> Saved:
        began = time.perf_counter()
        self.direct &= write_direct(self._path, self._nbytes)
        seconds = time.perf_counter() - began
        return Saved(seconds, seconds, seconds)

    def load(self, step: int, into: Live) -> float:
        self.direct &= read_direct(self._path, self._nbytes)
        return 1.0

    def remove(self, step: int) -> None:
        shutil.rmtree(self._folder)
        self._folder.mkdir()

    def close(self) -> None: ...


class Dscheck:
    """A Checkpointer that lives through all rounds, as one does in training."""

    name = "dscheck"

    def __init__(self, folder: Path, state: Live) -> None:
        self._root = folder
        self._ckpt = Checkpointer(folder, _mapping(state), rng=False)

    def save(self, step: int) -> Saved:
        began = time.perf_counter()
        handle = self._ckpt.save(step)
        returned = time.perf_counter() - began
        self._ckpt.fence()
        free = time.perf_counter() - began
        handle.wait()
        return Saved(returned, free, time.perf_counter() - began)

    def load(self, step: int, into: Live) -> float:
        with Checkpointer(self._root, _mapping(into), rng=False) as ckpt:
            ckpt.load(step)
            assert ckpt.loaded is not None
            return ckpt.loaded.bytes_read / ckpt.loaded.bytes

    def remove(self, step: int) -> None:
        shutil.rmtree(self._root / "steps" / str(step))

    def close(self) -> None:
        self._ckpt.close()


class Dcp:
    """torch.distributed.checkpoint, a new folder a save."""

    name = "torch DCP"

    def __init__(self, folder: Path, state: Live) -> None:
        self._folder, self._state = folder, state

    def save(self, step: int) -> Saved:
        began = time.perf_counter()
        dcp.save(self._state.named(), checkpoint_id=self._folder / str(step))
        seconds = time.perf_counter() - began
        return Saved(seconds, seconds, seconds)

    def load(self, step: int, into: Live) -> float:
        dcp.load(into.named(), checkpoint_id=self._folder / str(step))
        return 0.0

    def remove(self, step: int) -> None:
        shutil.rmtree(self._folder / str(step))

    def close(self) -> None: ...


class DcpAsync(Dcp):
    """The same with async_save, which copies the state before it returns."""

    name = "torch DCP, async_save"

    def save(self, step: int) -> Saved:
        began = time.perf_counter()
        future = dcp.async_save(self._state.named(), checkpoint_id=self._folder / str(step))
        returned = time.perf_counter() - began
        future.result()
        return Saved(returned, returned, time.perf_counter() - began)


ALL: tuple[Callable[[Path, Live], Contender], ...] = (RawDisk, Dscheck, Dcp, DcpAsync)


def _mapping(state: Live) -> dict[str, object]:
    return {"model": state.model, "optimizer": state.optimizer}
