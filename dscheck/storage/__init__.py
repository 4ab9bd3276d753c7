"""Where the bytes go: the protocol in `base`, one module a medium, and `open_storage`, which knows them by scheme."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from urllib.parse import unquote

from dscheck.errors import ConfigError
from dscheck.storage.base import Entry, ObjectWriter, Storage
from dscheck.storage.local import LocalStorage
from dscheck.storage.memory import MemoryStorage

__all__ = ["SCHEMES", "Entry", "LocalStorage", "MemoryStorage", "ObjectWriter", "Storage", "open_storage"]

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)


def open_storage(root: str | os.PathLike[str] | Storage) -> Storage:
    """The storage that `root` names: a path, a URL (`file://`, `memory://`), or a Storage, which is returned as it is.

    Nothing is created: the first write does that. Raises ConfigError for a scheme that is not known and a bad path.
    """
    if isinstance(root, Storage):
        return root
    if not isinstance(root, (str, os.PathLike)):
        raise ConfigError(f"a root is a path, a URL or a Storage, not {root!r} of type {type(root).__name__}")
    url = _URL.fullmatch(root) if isinstance(root, str) else None
    if url is None:
        return LocalStorage(root)
    scheme, rest = url.group(1).lower(), url.group(2)
    if scheme not in SCHEMES:
        # The rest of the URL may hold credentials.
        raise ConfigError(f"no storage for '{scheme}://' comes with this version: known are paths, {_known()}")
    return SCHEMES[scheme](rest)


def _open_file(rest: str) -> Storage:
    host, slash, path = rest.partition("/")
    if not slash or host not in ("", "localhost"):
        raise ConfigError(f"'file://{rest}' names no path of this host: write file:///absolute/path")
    return LocalStorage(unquote(slash + path))


def _open_memory(rest: str) -> Storage:
    name = rest.strip("/")
    if not name:
        raise ConfigError("a memory:// root needs a name, which is its identity in this process: memory://run")
    return MemoryStorage(name)


def _open_s3(rest: str) -> Storage:
    from dscheck.storage.s3 import S3Storage  # botocore takes 0.2 s to import

    return S3Storage(rest)


def _known() -> str:
    return ", ".join(f"{scheme}://" for scheme in SCHEMES)


# What follows `scheme://` → the storage. A plug-in adds its own.
SCHEMES: dict[str, Callable[[str], Storage]] = {"file": _open_file, "memory": _open_memory, "s3": _open_s3}
