"""Objects as files below a directory of a POSIX file system: a local disk, NFS, Lustre."""

from __future__ import annotations

import errno
import os
import re
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from dscheck.errors import CheckpointNotFoundError, ConfigError, DscheckError, StorageError
from dscheck.storage.base import Entry, ObjectWriter
from dscheck.storage.durable import Directories, sync_directory
from dscheck.storage.keys import check_key, check_prefix, check_range

if TYPE_CHECKING:
    from typing_extensions import Buffer

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
# Non-blocking: a FIFO in the place of an object must not hang its reader.
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK

_TEMPORARY = re.compile(r"\.put-[0-9a-f]{32}")
_OBJECTS = (".json", ".arrow", ".bin")

_ADVICE = {
    errno.ENOENT: "was the root, or a directory of it, deleted while this job ran? start the job again",
    errno.ENOTDIR: "move away what stands in the place of a directory, or save to another root",
    errno.EISDIR: "move it out of the root",
    errno.ENAMETOOLONG: "choose a root with a shorter path",
    errno.EPERM: "the file system forbids it: is something below the root immutable or append-only (`lsattr`)?",
    errno.ENOSPC: "free some space, or save to another root",
    errno.EDQUOT: "the quota is used up: free some space, or save to another root",
    errno.EACCES: "give the user of this job read and write permission below the root",
    errno.EROFS: "mount the file system for writing, or save to another root",
    errno.ELOOP: "no symbolic link is followed below a root: put the file itself there",
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
}
_NO_LINKS = "this file system makes no hard links, which publishing a record needs: choose another root"


class LocalStorage:
    """A Storage below the directory `root`, which the first write creates, with its parents.

    Keys are paths relative to the root; no link below it is followed. A text that begins with '~' is meant as a shell
    means it. Raises ConfigError when `root` is no directory.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        path = os.fspath(root)
        if not isinstance(path, str) or not path or "\0" in path:
            raise ConfigError(f"{path!r} is no directory's path: give a non-empty text without NUL")
        self.root = os.path.abspath(os.path.expanduser(root) if isinstance(root, str) else path)
        if os.path.lexists(self.root) and not os.path.isdir(self.root):
            raise ConfigError(f"'{self.root}' is not a directory: a root is a directory, or a path still to be created")
        self._directories = Directories(self.root)

    @property
    def url(self) -> str:
        return self.root

    def put_if_absent(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        with self._reporting("create", key):
            self._directories.make(os.path.dirname(path))
            temporary = _write_temporary(os.path.dirname(path), data)
            try:
                return _publish(temporary, path)
            finally:
                with suppress(OSError):
                    os.unlink(temporary)

    def create(self, key: str) -> ObjectWriter:
        path = self._path(key)
        with self._reporting("create", key):
            self._directories.make(os.path.dirname(path))
            return _FileWriter(self, key, path, os.open(path, _CREATE, 0o666))

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        with self.open_local(key) as (fd, size):
            check_range(self.url, key, offset, length, size)
            stop = size if length is None else offset + length
            pieces = []
            while offset < stop:
                # One call returns at most 2 GiB.
                pieces.append(os.pread(fd, stop - offset, offset))
                self._check_progress(key, offset, stop, len(pieces[-1]))
                offset += len(pieces[-1])
        return b"".join(pieces)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        with self.open_local(key) as (fd, size):
            stop = offset + buffer.nbytes
            check_range(self.url, key, offset, buffer.nbytes, size)
            while offset < stop:
                count = os.preadv(fd, [buffer[offset - stop :]], offset)
                self._check_progress(key, offset, stop, count)
                offset += count

    @contextmanager
    def open_local(self, key: str) -> Iterator[tuple[int, int]]:
        """The file of `key`, open for reading, and its size in bytes."""
        path = self._path(key)
        with self._reporting("read", key):
            try:
                fd = os.open(path, _READ)
            except FileNotFoundError as error:
                raise CheckpointNotFoundError(f"there is no '{path}'", url=self.url, key=key) from error
            try:
                info = os.fstat(fd)
                if not stat.S_ISREG(info.st_mode):
                    raise OSError(errno.EINVAL, "it is not a regular file")
                yield fd, info.st_size
            finally:
                os.close(fd)

    def list(self, prefix: str) -> Iterator[Entry]:
        check_prefix(self.url, prefix)
        with self._reporting("list", prefix):
            folder = prefix.rpartition("/")[0]
            path = os.path.join(self.root, folder) if folder else self.root
            self._directories.check(path)
            yield from _walk(path, f"{folder}/" if folder else "", prefix)

    def delete(self, key: str) -> None:
        path = self._path(key)
        # Synced in either case: the caller may be trying again what a failed sync or a crash left half done.
        with self._reporting("delete", key), suppress(FileNotFoundError):
            with suppress(FileNotFoundError):
                os.unlink(path)
            sync_directory(os.path.dirname(path))

    def abort_unfinished(self, prefix: str, older_than_s: float) -> int:
        """Also removes directories below the prefix that have been empty for as long: deletions leave them behind."""
        check_prefix(self.url, prefix)
        folder = os.path.join(self.root, prefix.rpartition("/")[0])
        with self._reporting("clean up", prefix):
            self._directories.check(folder.rstrip("/"))
            return _remove_unfinished(folder, time.time() - older_than_s)

    def _check_progress(self, key: str, offset: int, stop: int, count: int) -> None:
        """Raises CorruptCheckpointError when a read met the end: the file has shrunk since its size was asked."""
        if count == 0:
            check_range(self.url, key, offset, stop - offset, size=offset)

    def _path(self, key: str) -> str:
        """The file of `key`. Raises StorageError for a key that is none, or that a link would lead elsewhere."""
        check_key(self.url, key)
        path = os.path.join(self.root, key)
        with self._reporting("reach", key):
            self._directories.check(os.path.dirname(path))
        return path

    @contextmanager
    def _reporting(self, doing: str, key: str) -> Iterator[None]:
        """An OSError inside is raised as a StorageError that says what failed, where, why and what to do."""
        try:
            yield
        except DscheckError:
            raise
        except OSError as error:
            advice = _ADVICE.get(error.errno or 0)
            reason = (error.strerror or str(error)) + (f"; {advice}" if advice else "")
            path = os.path.join(self.root, key)
            raise StorageError(f"cannot {doing} '{path}': {reason}", url=self.url, key=key) from error


class _FileWriter:
    """One file under way, seen by readers from its creation on, as any POSIX file is."""

    def __init__(self, storage: LocalStorage, key: str, path: str, fd: int) -> None:
        self._storage, self._key, self._path = storage, key, path
        self._fd: int | None = fd
        self._born = os.fstat(fd)
        self._size = 0
        self._usable = True
        self._finished = False

    def write(self, data: Buffer) -> None:
        with self._final("write to") as fd:
            self._size += write_all(fd, memoryview(data))
        self._usable = True

    @contextmanager
    def reserved(self, nbytes: int) -> Iterator[int]:
        with self._final("write to") as fd:
            yield fd
            self._size = os.lseek(fd, nbytes, os.SEEK_SET)
        self._usable = True

    def commit(self) -> int:
        with self._final("commit") as fd:
            os.fsync(fd)
            size = os.fstat(fd).st_size
            if size != self._size:
                raise OSError(errno.EIO, f"{self._size} bytes were written, and the file holds {size}")
            if not self._is_ours():
                raise OSError(errno.ENOENT, "it was deleted while it was written")
            self._close()
            sync_directory(os.path.dirname(self._path))
            self._finished = True
        return size

    def abort(self) -> None:
        self._usable = False
        # Removed before it is closed, and once: a closed file's inode number may be that of another's file by now.
        with suppress(OSError):
            if not self._finished and self._is_ours():
                os.unlink(self._path)
        self._finished = True
        with suppress(OSError):
            self._close()

    def __del__(self) -> None:
        with suppress(OSError):
            self._close()

    @contextmanager
    def _final(self, doing: str) -> Iterator[int]:
        """Run one step after which the writer is not usable, unless the step says so: a failure cannot be retried."""
        if not self._usable or self._fd is None:
            message = f"cannot {doing} '{self._path}': it was committed, given up, or failed before"
            raise StorageError(message, url=self._storage.url, key=self._key)
        self._usable = False
        with self._storage._reporting(doing, self._key):
            yield self._fd

    def _close(self) -> None:
        # Linux frees the number even when close fails: never close it twice.
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _is_ours(self) -> bool:
        try:
            return os.path.samestat(os.lstat(self._path), self._born)
        except FileNotFoundError:
            return False


def write_all(fd: int, data: memoryview, offset: int | None = None) -> int:
    """All bytes of `data` (contiguous) are written, in as many calls as it takes, where the file stands or at `offset`;
    their number. Raises OSError.
    """
    rest = data.cast("B") if data.nbytes else memoryview(b"")
    while rest:
        done = data.nbytes - len(rest)
        count = os.write(fd, rest) if offset is None else os.pwrite(fd, rest, offset + done)
        if count <= 0:
            raise OSError(errno.EIO, f"the last {len(rest)} of {data.nbytes} bytes could not be written")
        rest = rest[count:]
    return data.nbytes


def _write_temporary(folder: str, data: bytes) -> str:
    """A synced file with `data` in `folder`, under a name that no listing shows. Leaves none when it raises."""
    path = os.path.join(folder, f".put-{uuid.uuid4().hex}")
    fd = os.open(path, _CREATE, 0o666)
    try:
        try:
            write_all(fd, memoryview(data))
            os.fsync(fd)
        finally:
            os.close(fd)
    except BaseException:
        with suppress(OSError):
            os.unlink(path)
        raise
    return path


def _publish(temporary: str, path: str) -> bool:
    """`path` durably names the file `temporary`; False when another file had the name before."""
    try:
        os.link(temporary, path)
    except OSError as error:
        # Over NFS the first answer may be lost and the repeated call be refused: which file is there decides.
        if not _same_file(temporary, path):
            return _lost(error, path)
    try:
        sync_directory(os.path.dirname(path))
    except OSError:
        # Left in place it would be read back and taken for durable.
        with suppress(OSError):
            os.unlink(path)
        raise
    return True


def _lost(error: OSError, path: str) -> bool:
    if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
        raise OSError(errno.EOPNOTSUPP, f"{error.strerror}; {_NO_LINKS}") from error
    if not isinstance(error, FileExistsError):
        raise error
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise OSError(errno.EEXIST, "something that is not a file has this name") from error
    return False


def _same_file(one: str, other: str) -> bool:
    # Inodes, not the link count: a backup that hard-links the directory raises the count as well.
    try:
        return os.path.samestat(os.lstat(one), os.lstat(other))
    except OSError:
        return False


def _remove_unfinished(root: str, before: float) -> int:
    """Temporary files below `root` that are older are gone, and empty directories too; the number of the files."""
    count = 0
    for folder, _, names in os.walk(root, topdown=False):
        for name in filter(_TEMPORARY.fullmatch, names):
            path = os.path.join(folder, name)
            with suppress(FileNotFoundError):  # its writer, or another clean-up, was faster
                if os.lstat(path).st_mtime < before:
                    os.unlink(path)
                    count += 1
        if folder != root and os.lstat(folder).st_mtime < before:
            with suppress(OSError):  # it is not empty, or somebody was faster
                os.rmdir(folder)
    return count


def _walk(path: str, base: str, prefix: str) -> Iterator[Entry]:
    """The files below `path`, whose keys begin with `base`; only those whose keys begin with `prefix`."""
    try:
        with os.scandir(path) as found:
            names = [entry for entry in found if not entry.name.startswith(".")]
    except FileNotFoundError:
        return
    for entry in names:
        key = base + entry.name
        try:
            info = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            # Deleted since the directory was read.
            continue
        if stat.S_ISDIR(info.st_mode):
            if key.startswith(prefix) and key.endswith(_OBJECTS):
                # Passed over for being empty, a record's would make its step "not there" (C15).
                raise OSError(errno.EISDIR, f"'{key}' is a directory in the place of an object")
            if f"{key}/".startswith(prefix):
                yield from _walk(entry.path, f"{key}/", prefix)
        elif key.startswith(prefix):
            if not stat.S_ISREG(info.st_mode):
                # Passed over, a linked record would make its step "not there" (C15).
                raise OSError(errno.EINVAL, f"'{key}' is neither a file nor a directory")
            yield Entry(key, info.st_size)
