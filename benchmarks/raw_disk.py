"""What the disk itself gives to direct I/O, and caches that hold nothing of what is read."""

from __future__ import annotations

import errno
import mmap
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

# Of every direct transfer's length, whatever the disk.
ALIGNMENT = 4096
WARM_BYTES = 4 << 20


class Access(NamedTuple):
    """How one process goes at a file: this many threads, each with one block under way."""

    block_bytes: int = 4 << 20
    threads: int = 1

    def __str__(self) -> str:
        return f"{self.threads} x {self.block_bytes / (1 << 20):g} MiB"


ONE_BLOCK = Access()
ACCESSES = tuple(Access(mib << 20, threads) for mib in (1, 4, 16) for threads in (1, 2, 4))


def write_direct(path: Path, nbytes: int, access: Access = ONE_BLOCK) -> bool:
    """Write `nbytes`, rounded up to ALIGNMENT, durably, past the page cache; False: it had to be a buffered write."""
    fd, direct = _open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        _each_block(nbytes, access, lambda part, offset: os.pwrite(fd, part, offset))
        os.fsync(fd)
    finally:
        os.close(fd)
    return direct


def read_direct(path: Path, nbytes: int, access: Access = ONE_BLOCK) -> bool:
    """Read what `write_direct` wrote, past the page cache; False: it had to be a buffered read."""
    fd, direct = _open(path, os.O_RDONLY)
    try:
        _each_block(nbytes, access, lambda part, offset: os.preadv(fd, [part], offset))
    finally:
        os.close(fd)
    return direct


def seconds_of(path: Path, nbytes: int, access: Access) -> tuple[float, float]:
    """What `write_direct` and `read_direct` take; `path` is removed."""
    began = time.perf_counter()
    write_direct(path, nbytes, access)
    written = time.perf_counter()
    read_direct(path, nbytes, access)
    read = time.perf_counter()
    path.unlink()
    return written - began, read - written


def _each_block(nbytes: int, access: Access, transfer: Callable[[memoryview, int], int]) -> None:
    """`transfer` each block of a file: the threads take turns, so that the file is gone through from front to end."""

    def work(thread: int) -> None:
        stride = access.block_bytes * access.threads
        with mmap.mmap(-1, access.block_bytes) as memory:
            memory.write(os.urandom(1 << 16) * (access.block_bytes >> 16))
            for offset in range(thread * access.block_bytes, nbytes, stride):
                with memoryview(memory) as view, view[: _length(nbytes - offset, access)] as part:
                    if transfer(part, offset) != len(part):
                        raise OSError(errno.EIO, "short direct transfer")

    if access.threads == 1:
        work(0)
        return
    with ThreadPoolExecutor(access.threads) as pool:
        list(pool.map(work, range(access.threads)))


def _length(left: int, access: Access) -> int:
    return min(access.block_bytes, -(-left // ALIGNMENT) * ALIGNMENT)


def _open(path: Path, flags: int) -> tuple[int, bool]:
    try:
        return os.open(path, flags | os.O_DIRECT, 0o666), True
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM):
            raise
        return os.open(path, flags, 0o666), False


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
