"""File systems of fsspec for the tests: one of each kind that the adapter tells apart, with its bytes in sight."""

from __future__ import annotations

import os
import threading
from typing import Any, ClassVar

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile


class Vault(MemoryFileSystem):
    """fsspec's own memory: its "create" looks first, and puts then."""

    protocol = "vault"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.replace("vault://", "memory://", 1)))


class Attic(LocalFileSystem):
    """fsspec's own local files: a rename replaces."""

    protocol = "attic"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(LocalFileSystem._strip_protocol(path.replace("attic://", "file://", 1)))


class Shelf(Attic):
    """Files that a rename does not replace, as in HDFS and SMB."""

    protocol = "shelf"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(LocalFileSystem._strip_protocol(path.replace("shelf://", "file://", 1)))

    def mv(self, path1: str, path2: str, **kwargs: Any) -> None:
        os.link(path1, path2)
        os.unlink(path1)


class Cloud(AsyncFileSystem):
    """An object store: asynchronous, folders in listings alone, uploads that show when complete, a true "create".

    It takes a `token`, and tells it in every error, as careless packages do.
    """

    protocol = "cloud"
    objects: ClassVar[dict[str, bytes]] = {}
    lock: ClassVar[threading.Lock] = threading.Lock()
    broken: ClassVar[set[str]] = set()
    """The verbs that fail."""

    def __init__(self, token: str = "", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.token = token

    def check(self, verb: str) -> None:
        if verb in self.broken:
            raise PermissionError(f"{verb} with token {self.token} is forbidden")

    async def _pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        self.check("put")
        path = self._strip_protocol(path)
        with self.lock:
            if mode == "create" and path in self.objects:
                raise FileExistsError(path)
            self.objects[path] = bytes(value)

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        self.check("get")
        path = self._strip_protocol(path)
        if path not in self.objects:
            raise FileNotFoundError(path)
        return self.objects[path][start:end]

    async def _info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        self.check("look")
        path = self._strip_protocol(path)
        if path in self.objects:
            return {"name": path, "size": len(self.objects[path]), "type": "file"}
        if any(name.startswith(f"{path}/") for name in list(self.objects)):
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    async def _ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        """From the listings kept, if there are any: they are older than what others have done meanwhile."""
        self.check("list")
        path = self._strip_protocol(path)
        found = self._ls_from_cache(path)
        if found is None:
            names = [name for name in list(self.objects) if name.startswith(f"{path}/")]
            children = sorted({f"{path}/{name[len(path) + 1 :].partition('/')[0]}" for name in names})
            if not children:
                raise FileNotFoundError(path)
            found = [await self._info(child) for child in children]
            self.dircache[path] = found
        return found if detail else [info["name"] for info in found]

    async def _rm_file(self, path: str, **kwargs: Any) -> None:
        self.check("delete")
        with self.lock:
            if self.objects.pop(self._strip_protocol(path), None) is None:
                raise FileNotFoundError(path)

    def invalidate_cache(self, path: str | None = None) -> None:
        if path is None:
            self.dircache.clear()

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> CloudFile:
        return CloudFile(self, path, mode)


class CloudFile(AbstractBufferedFile):
    DEFAULT_BLOCK_SIZE = 1 << 20

    def _initiate_upload(self) -> None:
        self.parts: list[bytes] = []

    def _upload_chunk(self, final: bool = False) -> bool:
        self.fs.check("upload")
        self.parts.append(self.buffer.getvalue())
        if final:
            with self.fs.lock:
                self.fs.objects[self.path] = b"".join(self.parts)
        return True

    def discard(self) -> None:
        self.parts = []


class Signed(Cloud):
    """One that reads user, password and a signature from its URL, and tells them all in its errors."""

    protocol = "signed"

    def __init__(self, url: str, token: str, **kwargs: Any) -> None:
        super().__init__(f"{token} at {url}", **kwargs)

    @staticmethod
    def _get_kwargs_from_urls(path: str) -> dict[str, str]:
        return {"url": path}

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(Cloud._strip_protocol(path)).rpartition("://")[2].rpartition("@")[2].partition("?")[0]


class Strict(Cloud):
    """One that takes no options."""

    protocol = "strict"

    def __init__(self) -> None:
        super().__init__()


for file_system in (Vault, Attic, Shelf, Cloud, Signed, Strict):
    fsspec.register_implementation(file_system.protocol, file_system, clobber=True)
fsspec.register_implementation("absent", "absent_fs.FileSystem", errtxt="Please install absent-fs to reach it")
