"""The settings that suit a root's storage, as `dscheck probe` found them, beside what the root holds.

They lie in a file whose name begins with a dot, which is no part of a checkpoint (docs/format.md F2): sealed JSON of
kind "tuning" with the object `settings`. Whoever can write it can make saves slower, and nothing else: only TUNABLE
settings are taken from it, each within its bounds.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from dscheck.config import Settings
from dscheck.errors import CorruptCheckpointError, DscheckError, StorageError
from dscheck.manifest.fields import VERSION, Fields
from dscheck.manifest.text import LIMIT_BYTES, seal, unseal
from dscheck.storage import LocalStorage, Storage

log = logging.getLogger("dscheck")

NAME = ".dscheck-tuning.json"
TUNABLE = frozenset({"read_threads", "io_threads", "direct_io"})
MOST_THREADS = 64


def tuned(storage: Storage) -> dict[str, Any]:
    """The stored settings of this version's TUNABLE ones; empty where there are none. Never an error: a warning."""
    if not isinstance(storage, LocalStorage):
        return {}
    path = os.path.join(storage.root, NAME)
    try:
        data = _read(path)
        return {} if data is None else _decode(data, path)
    except (OSError, DscheckError) as error:
        log.warning("the stored settings are ignored: %s; `dscheck probe` writes them anew", error)
        return {}


def store(storage: LocalStorage, settings: Mapping[str, Any]) -> str:
    """Replace the stored settings of a root that exists. Returns the file's path. Raises StorageError."""
    body = {"version": VERSION, "requires": [], "kind": "tuning", "settings": dict(settings), "time": time.time()}
    path = os.path.join(storage.root, NAME)
    temporary = os.path.join(storage.root, f".{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(seal(body))
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            os.unlink(temporary)
        raise StorageError(f"'{path}' could not be written: {error.strerror}", url=storage.url, key=NAME) from error
    return path


def _read(path: str) -> bytes | None:
    """At most one byte too many for `unseal`. A FIFO in the file's place is not waited for, a link not followed."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return os.read(fd, LIMIT_BYTES + 1)
    finally:
        os.close(fd)


def _decode(data: bytes, path: str) -> dict[str, Any]:
    body = unseal(data, path)
    Fields(body, path).envelope("tuning")
    settings = body.get("settings")
    if not isinstance(settings, dict):
        raise CorruptCheckpointError(f"'{path}': 'settings' is no object", url=path, key=NAME)
    known = {name: value for name, value in settings.items() if name in TUNABLE}
    too_many = [name for name, value in known.items() if type(value) is int and value > MOST_THREADS]
    if too_many:
        raise CorruptCheckpointError(f"'{path}': {too_many[0]} is over {MOST_THREADS}", url=path, key=NAME)
    Settings(**known)
    return known
