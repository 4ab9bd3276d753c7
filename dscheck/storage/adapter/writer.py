"""One large object that is written through a file of fsspec."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from dscheck.storage.adapter.connect import there

if TYPE_CHECKING:
    from typing_extensions import Buffer

MOST_BYTES = 16 << 20
"""Of one write: its bytes are copied, since the caller may reuse them and fsspec may keep them."""


class FsspecWriter:
    """Takes `file`, open for writing; `fs` is its file system. `visible`: even an upload shows before it is closed.

    `let_go` is called once, at the end of the writer's work.
    """

    def __init__(
        self,
        fs: Any,
        path: str,
        file: Any,
        *,
        visible: bool,
        reporting: Callable[[str], AbstractContextManager[None]],
        let_go: Callable[[], object],
    ) -> None:
        self._fs, self._path, self._file = fs, path, file
        self._visible = visible or not self._uploads()
        self._reporting, self._let_go = reporting, let_go
        self._size = 0
        self._usable = True
        self._finished = False
        self._hold()

    def write(self, data: Buffer) -> None:
        view = memoryview(data)
        view = view.cast("B") if view.nbytes else memoryview(b"")
        with self._final("write to"):
            for start in range(0, view.nbytes, MOST_BYTES):
                piece = bytes(view[start : start + MOST_BYTES])
                count = self._file.write(piece)
                if isinstance(count, int) and count != len(piece):
                    raise OSError(f"{count} of {len(piece)} bytes were written")
                self._size += len(piece)
        self._usable = True

    def commit(self) -> int:
        with self._final("commit"):
            if not self._visible and there(self._fs, self._path):
                raise OSError("another writer has made it meanwhile, and no object is overwritten")
            self._file.close()
            size = self._fs.info(self._path)["size"]
            if size != self._size:
                raise OSError(f"{self._size} bytes were written, and the object holds {size}")
            self._finish()
        return self._size

    def abort(self) -> None:
        self._usable = False
        if self._finished:
            return
        self._finish()
        with suppress(Exception):
            if self._uploads():
                self._file.discard()
            else:
                self._file.close()
        with suppress(Exception):
            if self._visible:
                self._fs.rm_file(self._path)

    def _finish(self) -> None:
        self._finished = True
        self._let_go()

    @contextmanager
    def _final(self, doing: str) -> Iterator[None]:
        """Run one step after which the writer is not usable, unless the step says so: a failure cannot be retried."""
        with self._reporting(doing):
            if not self._usable:
                raise OSError("it was committed, given up, or failed before")
            self._usable = False
            if self._uploads():
                self._file.closed = False
            try:
                yield
            finally:
                self._hold()

    def _hold(self) -> None:
        """Between two calls an upload counts as closed: else the finalizer of its file would complete it."""
        if self._uploads():
            self._file.closed = True

    def _uploads(self) -> bool:
        from fsspec.spec import AbstractBufferedFile

        return isinstance(self._file, AbstractBufferedFile)
