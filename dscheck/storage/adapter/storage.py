"""The six verbs over a file system of fsspec: Google Cloud Storage, Azure, HDFS, SFTP, or any that has a package."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from dscheck.errors import CheckpointNotFoundError, DscheckError, StorageError
from dscheck.storage.adapter import put
from dscheck.storage.adapter.connect import Connections, there
from dscheck.storage.adapter.writer import FsspecWriter
from dscheck.storage.base import Entry, ObjectWriter
from dscheck.storage.keys import check_key, check_prefix, check_range
from dscheck.storage.redact import Secrets, redact_url

UNSEEN_BYTES = 64 << 20
"""Most bytes that a read asks for without a look at the size: a damaged index may ask for any number (C9)."""


class FsspecStorage:
    """A Storage below `url`, opened with `options` as fsspec takes them. Raises ConfigError, StorageError.

    What an object survives is what the file system promises of a file that was closed; nothing is synced here.
    """

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        self._secrets = Secrets(url, options or {})
        self._url = redact_url(url.rstrip("/"))
        self._connections = Connections(url, options or {}, self._secrets)
        self._lock = threading.Lock()
        self._put: put.Put | None = None
        self._lack: str | None = None
        self._folders: set[str] = set()
        self._written: set[str] = set()

    @property
    def url(self) -> str:
        return self._url

    def lacks_condition(self) -> str | None:
        with self._lock, self._reporting("try a put at", ""):
            self._choose()
            return self._lack

    def put_if_absent(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        with self._reporting("create", key):
            with self._lock:
                chosen = self._choose()
            self._make_folder(path.rpartition("/")[0])
            return chosen(self._fs, path, bytes(data))

    def create(self, key: str) -> ObjectWriter:
        path = self._path(key)
        with self._reporting("create", key):
            with self._lock:
                if key in self._written or there(self._fs, path):
                    raise OSError("it exists, and no object is overwritten")
                self._written.add(key)
            fs = self._fs
            try:
                self._make_folder(path.rpartition("/")[0])
                file = fs.open(path, "wb")
            except BaseException:
                self._written.discard(key)
                raise
            return FsspecWriter(
                fs,
                path,
                file,
                visible=self._connections.renames,
                reporting=partial(self._reporting, key=key),
                let_go=partial(self._written.discard, key),
            )

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        path = self._path(key)
        if offset < 0 or (length is None and offset) or (length is not None and not 0 < length <= UNSEEN_BYTES):
            size = self._size(key, path)
            check_range(self.url, key, offset, length, size)
            length = size - offset if length is None else length
            if length == 0:
                return b""
        try:
            stop = None if length is None else offset + length
            data: bytes = self._fs.cat_file(path, start=offset or None, end=stop)
            if length is None or len(data) == length:
                return data
            failure: Exception = OSError(f"{len(data)} bytes came of {length} at {offset}")
        except Exception as error:
            failure = error
        # Not every file system says what was wrong, and some refuse the range of an empty object; its size tells.
        size = self._size(key, path)
        check_range(self.url, key, offset, length, size)
        if size == 0:
            return b""
        raise self._error("read", key, failure) from self._secrets.harmless(failure)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.read(key, offset, buffer.nbytes)

    def list(self, prefix: str) -> Iterator[Entry]:
        check_prefix(self.url, prefix)
        with self._reporting("list", prefix):
            self._fs.invalidate_cache()
            yield from self._walk(prefix.rpartition("/")[0], prefix)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._reporting("delete", key):
            try:
                self._fs.rm_file(path)
            except Exception:
                if there(self._fs, path):
                    raise

    @property
    def _fs(self) -> Any:
        return self._connections.fs

    def _choose(self) -> put.Put:
        """How small objects are put, found out by trying at the first one."""
        if self._put is not None:
            return self._put
        connections = self._connections
        self._make_folder(connections.root)
        ways = [*([put.create] if connections.has_create else []), *([put.rename] if connections.renames else [])]
        seen = [put.refutes(connections.connect, connections.root, way) for way in ways]
        if None in seen:
            self._put = ways[seen.index(None)]
        else:
            self._put = put.rename if connections.renames else put.replace
            tried = "; ".join(f"{way.__name__}: {what}" for way, what in zip(ways, seen, strict=True))
            self._lack = f"{connections.about} has no put-if-absent ({tried or 'it only looks before it writes'})"
        return self._put

    def _make_folder(self, folder: str) -> None:
        """It exists, one below the other from the root on. A store of objects has none, and would make a bucket."""
        if not self._connections.renames or folder in self._folders:
            return
        if folder != self._connections.root:
            self._make_folder(folder.rpartition("/")[0])
        try:
            self._fs.makedirs(folder, exist_ok=True)
        except Exception:
            # Not every package expects that another thread or rank makes it at the same moment.
            if not there(self._fs, folder):
                raise
        self._folders.add(folder)

    def _size(self, key: str, path: str) -> int:
        with self._reporting("read", key):
            try:
                info = self._fs.info(path)
            except (FileNotFoundError, NotADirectoryError):
                info = {}
            if info.get("type") != "file":
                raise CheckpointNotFoundError(f"there is no object '{self.url}/{key}'", url=self.url, key=key)
            return _bytes(info)

    def _walk(self, folder: str, prefix: str) -> Iterator[Entry]:
        """Folder by folder, since `find` passes over what it may not read, and a step must not seem to be gone."""
        path = self._connections.root + (f"/{folder}" if folder else "")
        try:
            found = self._fs.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return
        for info in found:
            name = str(info["name"]).rstrip("/").rpartition("/")[2]
            if name.startswith(".") or str(info["name"]).rstrip("/") == path:
                continue
            key = f"{folder}/{name}" if folder else name
            if info["type"] == "directory":
                if f"{key}/".startswith(prefix):
                    yield from self._walk(key, prefix)
            elif key.startswith(prefix):
                if info["type"] != "file":
                    raise OSError(f"'{key}' is neither a file nor a directory")
                yield Entry(key, _bytes(info))

    def _path(self, key: str) -> str:
        check_key(self.url, key)
        return f"{self._connections.root}/{key}"

    @contextmanager
    def _reporting(self, doing: str, key: str) -> Iterator[None]:
        """Whatever the file system raises inside is raised as a StorageError that says what failed and where."""
        try:
            yield
        except DscheckError:
            raise
        except Exception as error:
            raise self._error(doing, key, error) from self._secrets.harmless(error)

    def _error(self, doing: str, key: str, error: Exception) -> StorageError:
        why = (
            str(error)
            if isinstance(error, StorageError) or type(error) is OSError
            else f"{type(error).__name__}: {error}"
        )
        where = f"{self.url}/{key}" if key else self.url
        return StorageError(f"cannot {doing} '{where}': {self._secrets.hide(why)}", url=self.url, key=key)


def _bytes(info: Mapping[str, Any]) -> int:
    size = info.get("size")
    if type(size) is not int:
        raise OSError("the file system does not say how many bytes it holds")
    return size
