"""Who saves in benchmarks.stall, each through what its users call; all are a Method of benchmarks.stall_cost."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

from benchmarks.machine import disk
from benchmarks.stall_job import Training
from dscheck import Checkpointer, SaveHandle


class TorchSave:
    """`torch.save` in the loop: the call is all there is."""

    def __init__(self, job: Training, folder: Path) -> None:
        self._job, self._folder = job, folder
        self._seconds = 0.0

    def save(self, step: int) -> None:
        began = time.perf_counter()
        self._write(self._folder / f"{step}")
        self._seconds = time.perf_counter() - began

    def _write(self, path: Path) -> None:
        torch.save(self._job.state_dicts(), path)

    def guard(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def busy(self) -> bool:
        return False

    def wait(self) -> float:
        return self._seconds

    def remove(self, step: int) -> None:
        path = self._folder / f"{step}"
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    def close(self) -> None: ...


class DcpSave(TorchSave):
    """`torch.distributed.checkpoint.save`, a new folder a save."""

    def _write(self, path: Path) -> None:
        dcp.save(self._job.state_dicts(), checkpoint_id=path)


class Background(TorchSave):
    """A save whose end a future tells."""

    _future: Future[Any]
    _began: float

    def save(self, step: int) -> None:
        self._began, self._seconds = time.perf_counter(), 0.0
        self._future = self._start(self._folder / f"{step}")
        self._future.add_done_callback(self._ended)

    def _ended(self, _: Future[Any]) -> None:
        self._seconds = time.perf_counter() - self._began

    def _start(self, path: Path) -> Future[Any]:
        future = dcp.async_save(self._job.state_dicts(), checkpoint_id=path)
        assert isinstance(future, Future)
        return future

    def busy(self) -> bool:
        return not self._future.done()

    def wait(self) -> float:
        self._future.result(120)
        while not self._seconds:  # waiters wake before callbacks run
            time.sleep(0.001)
        return self._seconds


class DcpStaged(Background):
    """`async_save` with one DefaultStager for all saves: pinned, shared, overlapped; waited for before a step."""

    def __init__(self, job: Training, folder: Path) -> None:
        super().__init__(job, folder)
        cuda = job.device.type == "cuda"
        options = StagingOptions(use_pinned_memory=cuda, use_non_blocking_copy=cuda)
        self._stager = DefaultStager(options)
        self._staging: Future[Any] | None = None

    def _start(self, path: Path) -> Future[Any]:
        response = dcp.async_save(self._job.state_dicts(), checkpoint_id=path, async_stager=self._stager)
        assert isinstance(response, AsyncSaveResponse)
        self._staging = response.staging_completion
        return response.upload_completion

    @contextmanager
    def guard(self) -> Iterator[None]:
        if self._staging is not None:
            self._staging.result(120)
            self._staging = None
        yield

    def close(self) -> None:
        self._stager.close()


class TorchCheckpointing(Background):
    """torch_checkpointing's manager: asynchronous, staging memory made ahead, its lock round the optimizer's step.

    Its direct I/O is on for tmpfs alone: on ext4 it fails (EINVAL, unaligned).
    """

    def __init__(self, job: Training, folder: Path) -> None:
        super().__init__(job, folder)
        try:
            from torch_checkpointing import CheckpointManager
            from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig
        except ModuleNotFoundError as error:
            raise RuntimeError(f"not installed: {error.name}") from error
        storage = LocalFileSystemStorageConfig(use_direct_io=disk(folder) == "tmpfs")
        self._manager = CheckpointManager(CheckpointManager.Config(storage_config=storage))
        # A save of next to nothing has its writer's process started.
        self._manager.save(str(folder / "first"), {"first": torch.zeros(1)}).result(120)
        self._manager.prewarm_staging(job.state_dicts())
        # Its own save would wait for this; there is no public way to wait before the first one.
        made: Future[Any] | None = self._manager._prewarm_staging_future
        if made is not None:
            made.result(120)

    def _start(self, path: Path) -> Future[Any]:
        future: Future[Any] = self._manager.save(str(path), self._job.state_dicts())
        return future

    def guard(self) -> AbstractContextManager[Any]:
        lock: AbstractContextManager[Any] = self._manager.lock()
        return lock

    def close(self) -> None:
        self._manager.close()


class Dscheck:
    """A Checkpointer that lives as long as the training does. `handles`: of all its saves."""

    def __init__(self, job: Training, folder: Path, **settings: Any) -> None:
        self._folder = folder
        self.ckpt = Checkpointer(folder, job.state(), **settings)
        self.handles: list[SaveHandle] = []

    def save(self, step: int) -> None:
        self.handles.append(self.ckpt.save(step))

    def guard(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def busy(self) -> bool:
        return not self.handles[-1].done

    def wait(self) -> float:
        self.handles[-1].wait()
        return self.handles[-1].stats.committed_s or 0.0

    def remove(self, step: int) -> None:
        shutil.rmtree(self._folder / "steps" / str(step))

    def close(self) -> None:
        self.ckpt.close()
