"""Packages that save and load sharded state, as their documents say; each is in the comparison where it is installed.

`pip install -e '.[bench]'` brings them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from benchmarks.contenders import Contender, Dcp, DcpAsync, Dscheck, Saved
from benchmarks.machine import disk
from benchmarks.sharded_state import Live, start_of

WAIT_S = 600.0


class TorchCheckpointing(Dcp):
    """torch_checkpointing's manager, asynchronous, with its resharder where there is CUDA, which that needs to save.

    Its direct I/O is on for tmpfs alone: on ext4 it fails (EINVAL, unaligned).
    """

    def __init__(self, folder: Path, state: Live) -> None:
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.default_resharder import DefaultResharder
        from torch_checkpointing.schema import ItemSpec
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        super().__init__(folder, state)
        folder.mkdir(exist_ok=True)
        config = CheckpointManager.Config(
            items={"state": ItemSpec(resharder=DefaultResharder() if torch.cuda.is_available() else None)},
            storage_config=LocalFileSystemStorageConfig(use_direct_io=disk(folder) == "tmpfs"),
        )
        self._manager = CheckpointManager(config)

    def save(self, step: int) -> Saved:
        began = time.perf_counter()
        future = self._manager.save(str(self._folder / str(step)), {"state": self._state.named()})
        returned = time.perf_counter() - began
        with self._manager.lock():
            free = time.perf_counter() - began
        assert future is not None
        future.result(WAIT_S)
        return Saved(returned, free, time.perf_counter() - began)

    def load(self, step: int, into: Live) -> int:
        tensors = into.named()
        loaded = self._manager.load(str(self._folder / str(step)), {"state": tensors}, strict=True)["state"]
        _bring_home(loaded, tensors)
        return 0

    def close(self) -> None:
        self._manager.close()


class TorchSnapshot(Dcp):
    """torchsnapshot, given each DTensor as the ShardedTensor of the same memory: it knows no DTensor."""

    def save(self, step: int) -> Saved:
        from torchsnapshot import Snapshot, StateDict

        began = time.perf_counter()
        pending = Snapshot.async_take(str(self._folder / str(step)), {"state": StateDict(**_sharded(self._state))})
        returned = time.perf_counter() - began
        pending.wait()
        return Saved(returned, returned, time.perf_counter() - began)

    def load(self, step: int, into: Live) -> int:
        from torchsnapshot import Snapshot, StateDict

        if not all(isinstance(tensor, DTensor) or tensor.ndim == 0 for tensor in into.named().values()):
            raise NotImplementedError("no load of a sharded tensor into one that is not")
        Snapshot(str(self._folder / str(step))).restore({"state": StateDict(**_sharded(into))})
        return 0


class NvidiaResiliency(Dcp):
    """nvidia-resiliency-ext's DCP writer in a process kept from save to save; without CUDA forked by each."""

    def __init__(self, folder: Path, state: Live) -> None:
        from nvidia_resiliency_ext.checkpointing.async_ckpt.core import AsyncCallsQueue

        super().__init__(folder, state)
        if not torch.cuda.is_available():  # as it asks CUDA for the device even of host tensors
            torch.cuda.synchronize = lambda *_: None
            torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
        self._queue = AsyncCallsQueue(persistent=torch.cuda.is_available())

    def save(self, step: int) -> Saved:
        from nvidia_resiliency_ext.checkpointing.async_ckpt.core import AsyncRequest
        from nvidia_resiliency_ext.checkpointing.async_ckpt.filesystem_async import FileSystemWriterAsync
        from nvidia_resiliency_ext.checkpointing.async_ckpt.state_dict_saver import (
            save_state_dict_async_finalize,
            save_state_dict_async_plan,
        )

        began = time.perf_counter()
        writer = FileSystemWriterAsync(self._folder / str(step), thread_count=1)
        planned = save_state_dict_async_plan(self._state.named(), writer, None, 0)
        write, preload, arguments = writer.get_save_function_and_args()
        finalize = [lambda: save_state_dict_async_finalize(*planned)]
        self._queue.schedule_async_request(AsyncRequest(write, arguments, finalize, preload_fn=preload))
        returned = time.perf_counter() - began
        self._queue.maybe_finalize_async_calls(blocking=True)
        durable = time.perf_counter() - began
        # Tensors on the CPU are written from where they are: they may change when it is over.
        return Saved(returned, durable, durable)

    def close(self) -> None:
        self._queue.close()


ALL: dict[str, Callable[[Path, Live], Contender]] = {
    "dscheck": Dscheck,
    "torch DCP": Dcp,
    "torch DCP, async_save": DcpAsync,
    "torch_checkpointing": TorchCheckpointing,
    "torchsnapshot": TorchSnapshot,
    "nvidia-resiliency-ext": NvidiaResiliency,
}
PACKAGES = {name: name.split(",")[0].replace("torch DCP", "torch") for name in ALL}
"""What is to be installed for each."""


def _bring_home(loaded: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """What came back as other tensors than were given goes into these: part of the load."""
    for name, tensor in tensors.items():
        if loaded[name] is not tensor:
            tensor.copy_(loaded[name])


def _sharded(state: Live) -> dict[str, Any]:
    from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor

    def of(tensor: torch.Tensor) -> Any:
        if not isinstance(tensor, DTensor):
            return tensor
        local, start = tensor.to_local(), start_of(tensor)
        shards = [Shard.from_tensor_and_offsets(local, list(start), dist.get_rank())] if local.numel() else []
        return ShardedTensor._init_from_local_shards(shards, tensor.shape)

    return {name: of(tensor) for name, tensor in state.named().items()}
