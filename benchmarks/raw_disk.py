"""What the disk itself gives to direct I/O, and caches that hold nothing of what is read."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from dscheck.probe import Way, read_file, write_file

WARM_BYTES = 4 << 20
ONE_BLOCK = Way()
WAYS = tuple(Way(True, mib << 20, threads) for mib in (1, 4, 16) for threads in (1, 2, 4, 8))


def write_direct(path: Path, nbytes: int, way: Way = ONE_BLOCK) -> bool:
    """Write `nbytes`, rounded up to pages, durably, past the page cache; False: it had to be a buffered write."""
    return _direct_or_not(lambda one: write_file(path, nbytes, one), way)


def read_direct(path: Path, nbytes: int, way: Way = ONE_BLOCK) -> bool:
    """Read what `write_direct` wrote, past the page cache; False: it had to be a buffered read."""
    return _direct_or_not(lambda one: read_file(path, nbytes, one), way)


def seconds_of(path: Path, nbytes: int, way: Way) -> tuple[float, float]:
    """What `write_direct` and `read_direct` take; `path` is removed."""
    began = time.perf_counter()
    write_direct(path, nbytes, way)
    written = time.perf_counter()
    read_direct(path, nbytes, way)
    read = time.perf_counter()
    path.unlink()
    return written - began, read - written


def shown(way: Way) -> str:
    return f"{way.threads} x {way.block_bytes / (1 << 20):g} MiB"


def _direct_or_not(call: Callable[[Way], None], way: Way) -> bool:
    try:
        call(way)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM):
            raise
        call(way._replace(direct=False))
        return False
    return True


def evict(folder: Path, *, everything: bool) -> str:
    """Have the page cache hold nothing of the files below `folder`; how. `everything`: of any file, where allowed."""
    os.sync()
    if everything:
        try:
            Path("/proc/sys/vm/drop_caches").write_text("3")
            return "drop_caches"
        except OSError:
            pass
    for path in _files(folder):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    return "posix_fadvise"


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def warm_page_cache(path: Path, nbytes: int) -> None:
    """The next `nbytes` that the page cache takes are memory that was in use just now; `path` is written and removed.

    A virtual machine gives memory that is free back to its host within seconds, and pays to get it again: 1 GiB written
    through the page cache and synced took 4.8 s in memory as it was found, 0.7 s in memory that a file had just left.
    Touching anonymous memory instead was seen to change nothing.
    """
    chunk = bytes(WARM_BYTES)
    with path.open("wb", buffering=0) as file:
        for _ in range(-(-nbytes // WARM_BYTES)):
            file.write(chunk)
    path.unlink()
