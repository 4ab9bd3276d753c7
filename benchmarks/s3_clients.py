"""Who brings bytes to a bucket and back: dscheck, and plain clients that know nothing of checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import obstore
import s3fs
import torch
from obstore.store import S3Store

from dscheck import Checkpointer
from dscheck.storage.s3 import S3Storage
from dscheck.testing.servers import KEY, SECRET, S3Server

MIB = 1 << 20
PART, IN_FLIGHT = 16 * MIB, 4
TENSORS = 8

State = dict[str, torch.Tensor]


class Client(ABC):
    """Holds the same bytes as the others, in its own way. `plain`: of the clients that dscheck is compared with."""

    name: ClassVar[str]
    plain: ClassVar[bool] = True

    def __init__(self, server: S3Server, bucket: str, state: State, target: State) -> None:
        self._server, self._bucket, self._state, self._target = server, bucket, state, target

    @abstractmethod
    def save(self) -> None:
        """Everything of the state is in the bucket."""

    @abstractmethod
    def load(self) -> None:
        """Everything of it is in the target, from the last save."""

    @abstractmethod
    def clear(self) -> None:
        """Free the room in the bucket."""


class Dscheck(Client):
    name = "dscheck"
    plain = False

    def __init__(self, server: S3Server, bucket: str, state: State, target: State) -> None:
        super().__init__(server, bucket, state, target)
        self._storage = S3Storage(f"{bucket}/dscheck", server.options)
        # The only job that writes there, if there are no conditions.
        commit = {} if server.conditional else {"commit": "single-writer"}
        self._saving = Checkpointer(self._storage, state, rng=False, fresh=True, **commit)
        self._loading = Checkpointer(self._storage, target, rng=False)
        self._step = 0

    def save(self) -> None:
        self._step += 1
        self._saving.save(self._step).wait()

    def load(self) -> None:
        self._loading.load(self._step)

    def clear(self) -> None:
        for entry in [*self._storage.list("steps/")]:
            self._storage.delete(entry.key)


class Obstore(Client):
    """Rust: put in parts, ranges by threads, as fast as it was found to be (sync calls, payload not signed)."""

    name = "obstore"

    def __init__(self, server: S3Server, bucket: str, state: State, target: State) -> None:
        super().__init__(server, bucket, state, target)
        self._store = S3Store(
            bucket,
            endpoint=server.endpoint,
            access_key_id=KEY,
            secret_access_key=SECRET,
            region="us-east-1",
            virtual_hosted_style_request=False,
            unsigned_payload=True,
            client_options={"allow_http": True},
        )

    def save(self) -> None:
        for name, tensor in self._state.items():
            obstore.put(self._store, f"obstore/{name}", _view(tensor), chunk_size=PART, max_concurrency=IN_FLIGHT)

    def load(self) -> None:
        def fetch(job: tuple[str, int]) -> None:
            name, start = job
            out = _view(self._target[name])[start : start + PART]
            out[:] = memoryview(obstore.get_range(self._store, f"obstore/{name}", start=start, length=len(out)))

        jobs = [(name, start) for name, tensor in self._target.items() for start in range(0, tensor.nbytes, PART)]
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            list(pool.map(fetch, jobs))

    def clear(self) -> None:
        client = self._server.client()
        for name in self._state:
            client.delete_object(Bucket=self._bucket, Key=f"obstore/{name}")


class S3fs(Client):
    """Python: pipe_file and cat_ranges, with the same parts, payload not signed."""

    name = "s3fs, concurrent calls"

    def __init__(self, server: S3Server, bucket: str, state: State, target: State) -> None:
        super().__init__(server, bucket, state, target)
        config = {
            "s3": {"payload_signing_enabled": False},
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        }
        self._fs = s3fs.S3FileSystem(config_kwargs=config, skip_instance_cache=True, **server.options)

    def save(self) -> None:
        for name, tensor in self._state.items():
            self._fs.pipe_file(self._path(name), bytes(_view(tensor)), chunksize=PART, max_concurrency=IN_FLIGHT)

    def load(self) -> None:
        for name, tensor in self._target.items():
            view, starts = _view(tensor), range(0, tensor.nbytes, PART)
            ends = [min(start + PART, len(view)) for start in starts]
            ranges = self._fs.cat_ranges([self._path(name)] * len(ends), [*starts], ends, batch_size=IN_FLIGHT)
            for start, end, data in zip(starts, ends, ranges, strict=True):
                view[start:end] = data

    def clear(self) -> None:
        for name in self._state:
            self._fs.rm_file(self._path(name))
        self._fs.invalidate_cache()

    def _path(self, name: str) -> str:
        return f"{self._bucket}/{type(self).__name__}/{name}"


class S3fsFile(S3fs):
    """What a program does that was written for files."""

    name = "s3fs, file object"
    plain = False

    def save(self) -> None:
        for name, tensor in self._state.items():
            with self._fs.open(self._path(name), "wb", block_size=PART) as file:
                file.write(_view(tensor))

    def load(self) -> None:
        for name, tensor in self._target.items():
            with self._fs.open(self._path(name), "rb", block_size=PART) as file:
                view = _view(tensor)
                for start in range(0, len(view), PART):
                    file.readinto(view[start : start + PART])


CLIENTS: tuple[type[Client], ...] = (Dscheck, Obstore, S3fs, S3fsFile)


def _view(tensor: torch.Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().data
