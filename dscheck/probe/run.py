"""The self-test of a root: the storage in many ways, then dscheck with its defaults and with what was fastest."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from dscheck.config import Settings
from dscheck.errors import ConfigError, StorageError
from dscheck.probe.disk import Way, read_file, write_file
from dscheck.probe.reach import save_and_load
from dscheck.storage import LocalStorage, open_storage
from dscheck.tuning import store

BLOCKS = (4 << 20, 16 << 20, 1 << 20)
THREADS = (1, 4, 2, 8)
ENOUGH = 0.97
"""Of the best rate: fewer threads, or the kernel's own way, that reach it are preferred."""

_FILES_AT_ONCE = 3  # two saves of dscheck and one file
_SHARE_OF_TIME = 0.5


@dataclass(frozen=True, slots=True)
class Rate:
    """Bytes a second of writes and reads; None where it was refused."""

    write: float | None
    read: float | None


@dataclass(frozen=True, slots=True)
class Reached:
    """Bytes a second of a save and a load of dscheck with these settings."""

    settings: dict[str, Any]
    save: float
    load: float


@dataclass(slots=True)
class Findings:
    """`ways`: the storage by itself. `reached`: dscheck by settings; of these `chosen`, and `stored` in that file."""

    nbytes: int
    ways: dict[Way, Rate] = field(default_factory=dict)
    reached: list[Reached] = field(default_factory=list)
    stored: str | None = None

    @property
    def chosen(self) -> Reached:
        """What is faster overall. Raises ValueError where nothing has been reached."""
        return max(self.reached, key=lambda one: one.save * one.load)

    def best(self, verb: str, direct: bool | None = None) -> tuple[Way, float]:
        """The fastest way of "write" or "read", among direct or buffered ones or all. Raises ValueError for none."""
        rates = ((way, getattr(rate, verb)) for way, rate in self.ways.items() if direct in (None, way.direct))
        return max(((way, rate) for way, rate in rates if rate is not None), key=lambda one: one[1])


def probe(
    root: str,
    nbytes: int,
    seconds: float,
    *,
    keep: bool = True,
    tell: Callable[[str], None] = lambda _: None,
) -> Findings:
    """Measure `root` with files of `nbytes` for about `seconds`, and store the best settings there if `keep`.

    All is below one new folder whose name begins with a dot, which is gone afterwards, whatever happens. `tell` hears
    what is measured next. Raises ConfigError for a storage that is no file system, StorageError.
    """
    storage = open_storage(root)
    if not isinstance(storage, LocalStorage):
        raise ConfigError(f"'{storage.url}' is no directory: probe measures file systems")
    found = Findings(nbytes)
    try:
        os.makedirs(storage.root, exist_ok=True)
        _refuse_a_full_disk(storage, nbytes)
        folder = tempfile.mkdtemp(prefix=".dscheck-probe-", dir=storage.root)
        try:
            _measure_ways(found, folder, seconds * _SHARE_OF_TIME, tell)
            _measure_dscheck(found, folder, tell)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"'{storage.url}' cannot be probed: {error}", url=storage.url, key="") from error
    if keep:
        chosen = found.chosen
        found.stored = store(storage, chosen.settings, chosen.save, chosen.load)
    return found


def _refuse_a_full_disk(storage: LocalStorage, nbytes: int) -> None:
    free, needed = shutil.disk_usage(storage.root).free, _FILES_AT_ONCE * nbytes
    if free < needed:
        raise StorageError(
            f"'{storage.url}' has {free / 1e6:.0f} MB free and a probe needs {needed / 1e6:.0f}: give a smaller --size",
            url=storage.url,
            key="",
        )


def _measure_ways(found: Findings, folder: str, seconds: float, tell: Callable[[str], None]) -> None:
    """Ways in the order in which they matter, until the time is up; both kinds of I/O at least once."""
    deadline = time.monotonic() + seconds
    path = os.path.join(folder, "file")
    for way in _ways():
        kinds = {known.direct for known in found.ways}
        if time.monotonic() >= deadline and len(kinds) == 2:
            return
        tell(f"{'direct' if way.direct else 'buffered'}, {way.threads} x {way.block_bytes >> 20} MiB")
        write = _rate(found.nbytes, partial(write_file, path, found.nbytes, way))
        read = _rate(found.nbytes, partial(read_file, path, found.nbytes, way)) if write is not None else None
        found.ways[way] = Rate(write, read)


def _ways() -> Iterator[Way]:
    for block_bytes in BLOCKS:
        for threads in THREADS:
            for direct in (True, False):
                yield Way(direct, block_bytes, threads)


def _rate(nbytes: int, call: Callable[[], None]) -> float | None:
    """None where the file system refuses direct I/O."""
    began = time.perf_counter()
    try:
        call()
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        return None
    return nbytes / (time.perf_counter() - began)


def _measure_dscheck(found: Findings, folder: str, tell: Callable[[str], None]) -> None:
    """With the defaults, then with what the storage suggests."""
    candidates: list[dict[str, Any]] = [{}, _suggested(found)]
    for number, settings in enumerate(candidates):
        if settings in candidates[:number]:
            continue
        tell(f"dscheck, {describe(settings)}")
        root = os.path.join(folder, f"root-{number}")
        saved_s, loaded_s = save_and_load(root, found.nbytes, settings)
        found.reached.append(Reached(settings, found.nbytes / saved_s, found.nbytes / loaded_s))
        shutil.rmtree(root)


def _suggested(found: Findings) -> dict[str, Any]:
    """What differs from the defaults."""
    (write, _), (read, _) = _frugal(found, "write"), _frugal(found, "read")
    wanted = {"direct_io": write.direct, "io_threads": write.threads, "read_threads": read.threads}
    defaults = Settings()
    return {name: value for name, value in wanted.items() if getattr(defaults, name) != value}


def _frugal(found: Findings, verb: str) -> tuple[Way, float]:
    """The way with the fewest threads that is about as fast as the fastest one; direct rather than not."""
    _, best = found.best(verb)
    rates = [(way, getattr(rate, verb)) for way, rate in found.ways.items()]
    return min(
        ((way, rate) for way, rate in rates if rate is not None and rate >= ENOUGH * best),
        key=lambda one: (one[0].threads, not one[0].direct),
    )


def describe(settings: Mapping[str, Any]) -> str:
    """As a person would write them.

    >>> describe({"io_threads": 1, "direct_io": False})
    'io_threads=1, direct_io=False'
    """
    return ", ".join(f"{name}={value}" for name, value in settings.items()) or "defaults"
