"""What the disk itself gives: O_DIRECT in chunks of 4 MiB, and caches that hold nothing of what is read."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

CHUNK_BYTES = 4 << 20
# Of every direct transfer's length, whatever the disk.
ALIGNMENT = 4096


def write_direct(path: Path, nbytes: int) -> bool:
    """Write `nbytes`, rounded up to ALIGNMENT, durably, past the page cache; False: it had to be a buffered write."""
    with mmap.mmap(-1, CHUNK_BYTES) as chunk:
        chunk.write(os.urandom(CHUNK_BYTES))
        fd, direct = _open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            for offset in range(0, nbytes, CHUNK_BYTES):
                with memoryview(chunk) as view, view[: _length(nbytes - offset)] as part:
                    if os.pwrite(fd, part, offset) != len(part):
                        raise OSError(errno.EIO, "short direct write")
            os.fsync(fd)
        finally:
            os.close(fd)
    return direct


def read_direct(path: Path, nbytes: int) -> bool:
    """Read what `write_direct` wrote, past the page cache; False: it had to be a buffered read."""
    with mmap.mmap(-1, CHUNK_BYTES) as chunk:
        fd, direct = _open(path, os.O_RDONLY)
        try:
            for offset in range(0, nbytes, CHUNK_BYTES):
                with memoryview(chunk) as view, view[: _length(nbytes - offset)] as part:
                    if os.preadv(fd, [part], offset) != len(part):
                        raise OSError(errno.EIO, "short direct read")
        finally:
            os.close(fd)
    return direct


def _length(left: int) -> int:
    return min(CHUNK_BYTES, -(-left // ALIGNMENT) * ALIGNMENT)


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
    for path in (path for path in folder.rglob("*") if path.is_file()):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    return "posix_fadvise"


def warm_page_cache(path: Path, nbytes: int) -> None:
    """The next `nbytes` that the page cache takes are memory that was in use just now; `path` is written and removed.

    A virtual machine gives memory that is free back to its host within seconds, and pays to get it again: 1 GiB written
    through the page cache and synced took 4.8 s in memory as it was found, 0.7 s in memory that a file had just left.
    Touching anonymous memory instead was seen to change nothing.
    """
    chunk = bytes(CHUNK_BYTES)
    with path.open("wb", buffering=0) as file:
        for _ in range(-(-nbytes // CHUNK_BYTES)):
            file.write(chunk)
    path.unlink()
