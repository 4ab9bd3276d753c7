"""One object in parts: they go up several at once, out of the memory in which they were captured, while more come."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from dscheck.save.trace import Trace
from dscheck.storage.base import PartWriter

JOINED_BYTES = 1 << 20
"""What is shorter is copied: a part should go to the socket in few pieces."""

LOOK_S = 0.5
"""How often a wait for parts looks at the deadline."""

Free = Callable[[], None]


class InParts:
    """Appends bytes to an object of about `nbytes` bytes.

    `stop` is called while it waits, and raises to give up. `may_hold` says whether memory that was lent may be kept
    until more has come: else what does not fill a part is copied, so that it cannot block what it waits for.
    """

    def __init__(
        self, writer: PartWriter, nbytes: int, trace: Trace, stop: Callable[[], None], may_hold: Callable[[], bool]
    ) -> None:
        self._writer, self._trace, self._stop, self._may_hold = writer, trace, stop, may_hold
        self._part_bytes = writer.part_bytes(nbytes)
        self._pool = ThreadPoolExecutor(writer.parts_in_flight, "dscheck-put")
        self._slots = threading.Semaphore(writer.parts_in_flight)
        self._number = 0
        self._error: BaseException | None = None
        self._buffers: list[memoryview | bytearray] = []
        self._lent: list[_Lent] = []
        self._missing = self._part_bytes
        self.offset = 0

    def pad_to(self, offset: int) -> None:
        if offset > self.offset:
            self.write(bytes(offset - self.offset))

    def write(self, data: bytes | memoryview, free: Free | None = None) -> None:
        """Append `data`, which the caller may reuse once `free` was called, from any thread; without it, at once."""
        view = memoryview(data)
        self.offset += len(view)
        lent = None if free is None else _Lent(free)
        while len(view):
            first, view = view[: self._missing], view[self._missing :]
            if lent is None or len(data) < JOINED_BYTES:
                self._own().extend(first)
            else:
                self._buffers.append(first)
                self._lent.append(lent.again())
            self._missing -= len(first)
            if not self._missing:
                self._put()
        if lent is not None:
            lent.give_back()
        if self._lent and not self._may_hold():
            self._copy_lent()

    def flush(self) -> None:
        """All is put, and nothing can be appended any more. Raises the first error of a part."""
        if self._buffers:
            self._put()
        for _ in range(self._writer.parts_in_flight):
            self._take_slot()
        self._pool.shutdown()

    def _own(self) -> bytearray:
        if not self._buffers or not isinstance(self._buffers[-1], bytearray):
            self._buffers.append(bytearray())
        last = self._buffers[-1]
        assert isinstance(last, bytearray)
        return last

    def _copy_lent(self) -> None:
        """Nothing of the part under way lies in memory of others any more."""
        self._buffers = [bytearray().join(self._buffers)]
        for lent in self._lent:
            lent.give_back()
        self._lent = []

    def _put(self) -> None:
        self._take_slot()
        buffers, self._buffers = [memoryview(buffer) for buffer in self._buffers], []
        lent, self._lent = self._lent, []
        self._missing = self._part_bytes
        self._pool.submit(self._put_part, self._number, buffers, lent)
        self._number += 1

    def _take_slot(self) -> None:
        """Wait until one part less is under way than may be."""
        while not self._slots.acquire(timeout=LOOK_S):
            self._stop()
        self._stop()
        if self._error is not None:
            raise self._error

    def _put_part(self, number: int, buffers: list[memoryview], lent: list[_Lent]) -> None:
        try:
            with self._trace.span("write", sum(map(len, buffers))):
                self._writer.put_part(number, buffers)
        except BaseException as error:
            self._error = self._error or error
        finally:
            for one in lent:  # after an error too: the capture must come to its end
                one.give_back()
            self._slots.release()


class _Lent:
    """Memory that several parts send from: given back when the last of them has, and whoever cuts it into parts."""

    def __init__(self, free: Free) -> None:
        self._free, self._users, self._lock = free, 1, threading.Lock()

    def again(self) -> _Lent:
        with self._lock:
            self._users += 1
        return self

    def give_back(self) -> None:
        with self._lock:
            self._users -= 1
            last = not self._users
        if last:
            self._free()
