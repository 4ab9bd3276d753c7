"""The settings that suit a root's storage, and the rates reached with them, as `dscheck probe` found them.

They lie beside what the root holds, in a file whose name begins with a dot, which is no part of a checkpoint
(docs/format.md F2): sealed JSON of kind "tuning" with the object `settings`, and in bytes a second what a save and a
load of one process reached. Whoever can write it can make saves slower and forecasts wrong, and nothing else: only
TUNABLE settings are taken from it, each within its bounds.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from dscheck.config import Settings
from dscheck.errors import DscheckError, StorageError
from dscheck.manifest.fields import VERSION, Fields
from dscheck.manifest.text import LIMIT_BYTES, seal, unseal
from dscheck.storage import LocalStorage, Storage

log = logging.getLogger("dscheck")

NAME = ".dscheck-tuning.json"
TUNABLE = frozenset({"read_threads", "io_threads", "direct_io"})
MOST_THREADS = 64


@dataclass(frozen=True, slots=True)
class Tuning:
    """`settings`: of this version's TUNABLE ones. `save_bytes_s`, `load_bytes_s`: what one process reached with them
    when the probe ended, at `time` in seconds since the epoch.
    """

    settings: dict[str, Any]
    save_bytes_s: float
    load_bytes_s: float
    time: float


def tuned(storage: Storage) -> Tuning | None:
    """What was stored, or None where nothing was. Never an error: a warning."""
    if not isinstance(storage, LocalStorage):
        return None
    path = os.path.join(storage.root, NAME)
    try:
        data = _read(path)
        return None if data is None else _decode(data, path)
    except (OSError, DscheckError) as error:
        log.warning("the stored settings are ignored: %s; `dscheck probe` writes them anew", error)
        return None


def store(storage: LocalStorage, settings: Mapping[str, Any], save_bytes_s: float, load_bytes_s: float) -> str:
    """Replace what is stored in a root that exists. Returns the file's path. Raises StorageError."""
    body = {
        "version": VERSION,
        "requires": [],
        "kind": "tuning",
        "settings": dict(settings),
        "save_bytes_s": save_bytes_s,
        "load_bytes_s": load_bytes_s,
        "time": time.time(),
    }
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


def _decode(data: bytes, path: str) -> Tuning:
    fields = Fields(unseal(data, path), path)
    fields.envelope("tuning")
    known = {name: value for name, value in fields.members("settings").items() if name in TUNABLE}
    for name, value in known.items():
        if type(value) is int and value > MOST_THREADS:
            raise fields.corrupt(f"settings.{name}", f"is {value}, at most {MOST_THREADS} expected")
    Settings(**known)
    for name in ("save_bytes_s", "load_bytes_s"):
        if fields.number(name) <= 0:
            raise fields.corrupt(name, f"is {fields.number(name)}, a rate above 0 expected")
    return Tuning(known, fields.number("save_bytes_s"), fields.number("load_bytes_s"), fields.number("time"))
