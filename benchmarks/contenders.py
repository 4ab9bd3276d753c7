"""Who saves and loads in the comparison, each through what its users call."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from benchmarks.raw_disk import read_direct, write_direct
from benchmarks.sharded_state import Live
from dscheck import Checkpointer
from dscheck.probe import Way


@dataclass(frozen=True, slots=True)
class Saved:
    """Seconds on this rank since save was called: when it returned, tensors could change, the step existed."""

    returned: float
    free: float
    durable: float


class Contender(Protocol):
    """One way to save and load below a folder of its own. All calls are made by all ranks together."""

    def save(self, step: int) -> Saved:
        """Save the state it was made with, durably."""

    def load(self, step: int, into: Live) -> int:
        """Fill `into`, and return how many bytes this rank read; 0 when it does not say."""

    def remove(self, step: int) -> None:
        """Free the disk of what `save` made. Called on one rank."""

    def close(self) -> None: ...


class RawDisk:
    """As many bytes as the state has, past the page cache; what is loaded is not looked at."""

    def __init__(self, folder: Path, nbytes: int, write: Way, read: Way) -> None:
        self._path, self._nbytes = folder / f"raw-{dist.get_rank()}", nbytes
        self._write, self._read = write, read
        self.direct = True

    def save(self) -> Saved:
        began = time.perf_counter()
        self.direct &= write_direct(self._path, self._nbytes, self._write)
        seconds = time.perf_counter() - began
        return Saved(seconds, seconds, seconds)

    def load(self) -> None:
        self.direct &= read_direct(self._path, self._nbytes, self._read)

    def remove(self) -> None:
        self._path.unlink()


class Dscheck:
    """A Checkpointer that lives through all rounds, as one does in training."""

    def __init__(self, folder: Path, state: Live) -> None:
        self._root = folder
        self._ckpt = Checkpointer(folder, state.mapping(), rng=False)

    def save(self, step: int) -> Saved:
        began = time.perf_counter()
        handle = self._ckpt.save(step)
        returned = time.perf_counter() - began
        self._ckpt.fence()
        free = time.perf_counter() - began
        handle.wait()
        return Saved(returned, free, time.perf_counter() - began)

    def load(self, step: int, into: Live) -> int:
        with Checkpointer(self._root, into.mapping(), rng=False) as ckpt:
            ckpt.load(step)
            assert ckpt.loaded is not None
            return ckpt.loaded.bytes_read

    def remove(self, step: int) -> None:
        shutil.rmtree(self._root / "steps" / str(step))

    def close(self) -> None:
        self._ckpt.close()


class Dcp:
    """torch.distributed.checkpoint, a new folder a save."""

    def __init__(self, folder: Path, state: Live) -> None:
        self._folder, self._state = folder, state

    def save(self, step: int) -> Saved:
        began = time.perf_counter()
        dcp.save(self._state.named(), checkpoint_id=self._folder / str(step))
        seconds = time.perf_counter() - began
        return Saved(seconds, seconds, seconds)

    def load(self, step: int, into: Live) -> int:
        dcp.load(into.named(), checkpoint_id=self._folder / str(step))
        return 0

    def remove(self, step: int) -> None:
        shutil.rmtree(self._folder / str(step))

    def close(self) -> None: ...


class DcpAsync(Dcp):
    """The same with async_save, which copies the state before it returns."""

    def save(self, step: int) -> Saved:
        began = time.perf_counter()
        future = dcp.async_save(self._state.named(), checkpoint_id=self._folder / str(step))
        returned = time.perf_counter() - began
        future.result()
        return Saved(returned, returned, time.perf_counter() - began)
