"""A file system without dscheck: one file, written and read in a given way."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

ALIGNMENT = 4096
"""Of every transfer's memory, offset and length: what all disks take for direct I/O."""

_RANDOM_BYTES = 1 << 16
_LIBC = ctypes.CDLL(None)


class Way(NamedTuple):
    """How one process goes at a file: this many threads, each with one block under way."""

    direct: bool = True
    block_bytes: int = 4 << 20
    threads: int = 1


def write_file(path: str | os.PathLike[str], nbytes: int, way: Way) -> None:
    """A new file of `nbytes`, rounded up to ALIGNMENT, durably. Raises OSError, EINVAL where direct I/O is refused."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _flag(way), 0o666)
    try:
        if way.direct:
            _reserve(fd, -(-nbytes // ALIGNMENT) * ALIGNMENT)
        _each_block(nbytes, way, lambda part, offset: os.pwrite(fd, part, offset))
        os.fsync(fd)
    finally:
        os.close(fd)


def read_file(path: str | os.PathLike[str], nbytes: int, way: Way) -> None:
    """Read what `write_file` wrote, from the disk also where it is buffered, and look at nothing. Raises as that."""
    fd = os.open(path, os.O_RDONLY | _flag(way))
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        _each_block(nbytes, way, lambda part, offset: os.preadv(fd, [part], offset))
    finally:
        os.close(fd)


def _reserve(fd: int, nbytes: int) -> None:
    """Threads that write directly would else take turns to extend the file. Where it is refused nothing is done, while
    os.posix_fallocate would write.
    """
    _LIBC.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes))


def _flag(way: Way) -> int:
    return os.O_DIRECT if way.direct else 0


def _each_block(nbytes: int, way: Way, transfer: Callable[[memoryview, int], int]) -> None:
    """`transfer` each block of a file: the threads take turns, so that the file is gone through from front to end."""

    def work(thread: int) -> None:
        with mmap.mmap(-1, way.block_bytes) as memory:
            memory.write(os.urandom(_RANDOM_BYTES) * (way.block_bytes // _RANDOM_BYTES))
            for offset in range(thread * way.block_bytes, nbytes, way.block_bytes * way.threads):
                length = min(way.block_bytes, -(-(nbytes - offset) // ALIGNMENT) * ALIGNMENT)
                with memoryview(memory) as view, view[:length] as part:
                    if transfer(part, offset) != length:
                        raise OSError(errno.EIO, "short transfer")

    if way.threads == 1:
        work(0)
        return
    with ThreadPoolExecutor(way.threads) as pool:
        list(pool.map(work, range(way.threads)))
