"""Directories whose entries outlive a power cut, and which nobody has replaced by a link out of the root."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress

# What some network and FUSE file systems answer that have no directory to sync.
_NOTHING_TO_SYNC = (errno.EINVAL, errno.ENOTSUP)


def sync_directory(path: str) -> None:
    """The entries of `path` (files, links, subdirectories) are on disk. Raises OSError; a failure is final."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NOTHING_TO_SYNC:
            raise
    finally:
        os.close(fd)


class Directories:
    """The directories of one root, each looked at once in the life of this object. Any thread may use it."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._durable: set[str] = set()
        self._plain: set[str] = {root}

    def make(self, folder: str) -> None:
        """`folder`, the root or below it, exists, and so do on disk its entry and those of all directories above.

        A directory that is there already is synced too, once: another rank may have made it a moment ago.
        `check` comes first: this follows links. Raises OSError.
        """
        if folder in self._durable:
            return
        if folder == self._root:
            self._make_root()
        else:
            self.make(os.path.dirname(folder))
            self._make_below(folder)
        self._durable.add(folder)

    def check(self, folder: str) -> None:
        """No link stands between the root and `folder`, which need not exist. Raises NotADirectoryError."""
        if folder in self._plain:
            return
        self.check(os.path.dirname(folder))
        try:
            mode = os.lstat(folder).st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISDIR(mode):
            raise NotADirectoryError(
                errno.ENOTDIR, "a file or a symbolic link stands where a directory belongs", folder
            )
        self._plain.add(folder)

    def _make_root(self) -> None:
        os.makedirs(self._root, exist_ok=True)
        path = os.path.realpath(self._root)
        # What we may not write to, and what lies above a mount point, holds no entry that a rank of this job has made.
        while not os.path.ismount(path) and os.access(os.path.dirname(path), os.W_OK):
            path = os.path.dirname(path)
            sync_directory(path)

    def _make_below(self, folder: str) -> None:
        try:
            os.mkdir(folder)
            made = True
        except FileExistsError:
            made = False
        try:
            sync_directory(os.path.dirname(folder))
        except OSError:
            # A later sync would succeed without this entry: only an entry made anew can be trusted.
            if made:
                with suppress(OSError):
                    os.rmdir(folder)
            raise
