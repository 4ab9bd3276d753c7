"""The adapter for fsspec against real servers of other makers: SFTP, FTP, and Azurite for Azure's blobs.

`pip install -e '.[stores]'`, for the last one `npm install -g azurite` too, and pytest with --heavy.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dscheck.commit import SingleWriter
from dscheck.storage import Storage, open_storage
from dscheck.storage.adapter import FsspecStorage
from dscheck.testing.conformance import Raw, StorageConformance

pytestmark = pytest.mark.heavy


class ServesFiles(StorageConformance):
    """A server over a folder of this machine, whose renames replace."""

    conditional = False
    race_rounds = 4
    large_bytes = 12 << 20

    @pytest.fixture
    def reopen(self, address: str, tmp_path: Path) -> Callable[[], FsspecStorage]:
        def reopen() -> FsspecStorage:
            storage = open_storage(f"{address}{tmp_path}/run")
            assert isinstance(storage, FsspecStorage)
            return storage

        return reopen

    @pytest.fixture
    def storage(self, reopen: Callable[[], FsspecStorage]) -> Storage:
        return SingleWriter(reopen())

    @pytest.fixture
    def other(self, reopen: Callable[[], FsspecStorage]) -> Storage:
        return SingleWriter(reopen())

    @pytest.fixture
    def raw(self, tmp_path: Path) -> Raw:
        def read(key: str) -> bytes | None:
            path = tmp_path / "run" / key
            return path.read_bytes() if path.exists() else None

        return read

    def test_its_rename_is_no_condition(self, reopen: Callable[[], FsspecStorage]) -> None:
        assert "rename: a second put replaced the first one" in (reopen().lacks_condition() or "")


@pytest.fixture(scope="module")
def sftp_server() -> str:
    pytest.importorskip("paramiko")
    asyncssh = pytest.importorskip("asyncssh")

    class Server(asyncssh.SSHServer):  # type: ignore[name-defined,misc]
        def password_auth_supported(self) -> bool:
            return True

        def validate_password(self, username: str, password: str) -> bool:
            return password == "sftp-password"

    loop = asyncio.new_event_loop()
    keys = [asyncssh.generate_private_key("ssh-ed25519")]
    server = loop.run_until_complete(
        asyncssh.create_server(Server, "127.0.0.1", 0, server_host_keys=keys, sftp_factory=True)
    )
    threading.Thread(target=loop.run_forever, daemon=True).start()  # its connections end with the process
    return f"sftp://me:sftp-password@127.0.0.1:{server.get_port()}"


class TestSftp(ServesFiles):
    @pytest.fixture
    def address(self, sftp_server: str) -> str:
        return sftp_server


@pytest.fixture(scope="module")
def ftp_server() -> Iterator[str]:
    pytest.importorskip("pyftpdlib")
    from pyftpdlib.authorizers import DummyAuthorizer
    from pyftpdlib.handlers import FTPHandler
    from pyftpdlib.servers import ThreadedFTPServer

    class Handler(FTPHandler):  # type: ignore[misc]
        authorizer = DummyAuthorizer()

    Handler.authorizer.add_user("me", "ftp-password", "/", perm="elradfmwMT")
    server = ThreadedFTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"handle_exit": False}, daemon=True)
    thread.start()
    yield f"ftp://me:ftp-password@127.0.0.1:{server.address[1]}"
    server.close_all()
    thread.join(10)


class TestFtp(ServesFiles):
    @pytest.fixture
    def address(self, ftp_server: str) -> str:
        return ftp_server


ACCOUNT = {
    # The one account that Azurite has, published with it.
    "AccountName": "devstoreaccount1",
    "AccountKey": "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==",
}


@pytest.fixture(scope="module")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    blobs = pytest.importorskip("azure.storage.blob")
    pytest.importorskip("adlfs")
    command = shutil.which("azurite-blob")
    if command is None:
        pytest.skip("needs azurite-blob, of npm's azurite")
    port = _free_port()
    place = ["--location", str(tmp_path_factory.mktemp("azurite")), "--blobPort", str(port)]
    flags = ["--silent", "--skipApiVersionCheck", "--disableTelemetry"]
    server = subprocess.Popen(["timeout", "600", command, *place, *flags])
    try:
        _wait_for(port)
        parts = {"DefaultEndpointsProtocol": "http", **ACCOUNT}
        parts["BlobEndpoint"] = f"http://127.0.0.1:{port}/{ACCOUNT['AccountName']}"
        address = "".join(f"{name}={value};" for name, value in parts.items())
        blobs.BlobServiceClient.from_connection_string(address).create_container("box")
        yield {"connection_string": address}
    finally:
        server.terminate()
        server.wait(10)


class TestAzure(StorageConformance):
    race_rounds = 10

    @pytest.fixture
    def root(self) -> str:
        return f"az://box/{uuid.uuid4().hex}"

    @pytest.fixture
    def storage(self, azurite: dict[str, Any], root: str) -> Storage:
        return open_storage(root, azurite)

    @pytest.fixture
    def other(self, azurite: dict[str, Any], root: str) -> Storage:
        return open_storage(root, azurite)

    @pytest.fixture
    def raw(self, azurite: dict[str, Any], root: str) -> Raw:
        from azure.storage.blob import BlobServiceClient

        service = BlobServiceClient.from_connection_string(azurite["connection_string"])

        def read(key: str) -> bytes | None:
            blob = service.get_blob_client("box", f"{root.removeprefix('az://box/')}/{key}")
            return bytes(blob.download_blob().readall()) if blob.exists() else None

        return read

    def test_its_condition_holds(self, storage: Storage) -> None:
        assert isinstance(storage, FsspecStorage)
        assert storage.lacks_condition() is None

    @pytest.mark.parametrize("key", ["schritt/größe-7", "検/查", "a b/c+d%20&=#~*", "a:b/@{}'\"", "a..b/c."])
    def test_unusual_keys_are_kept_as_they_are(self, storage: Storage, raw: Raw, key: str) -> None:
        """All but those with a `?`, behind which adlfs looks for a version."""
        super().test_unusual_keys_are_kept_as_they_are(storage, raw, key)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _wait_for(port: int, patience_s: float = 30.0) -> None:
    until = time.monotonic() + patience_s
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)
