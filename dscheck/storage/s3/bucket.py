"""One bucket as it is asked: requests that are tried again, with credentials that are looked for again."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from dscheck.native import crc32c
from dscheck.storage.backoff import Backoff
from dscheck.storage.s3.failures import ExpiredCredentialsError, reporting
from dscheck.storage.s3.options import S3Options

T = TypeVar("T")

SLICE_BYTES = 1 << 20
"""Of one call to a socket, which has CONNECT_S to take it."""


class Bucket:
    """The requests of one bucket. `url`: of the root, for errors. Any thread may use it."""

    def __init__(self, name: str, url: str, options: S3Options) -> None:
        self.name, self.url, self.options = name, url, options
        self._client = options.client()
        self._renewing = threading.Lock()
        self.backoff = Backoff(patience_s=options.patience_s)

    def ask(self, doing: str, key: str, request: str, stop: threading.Event | None = None, **given: Any) -> Any:
        """One request of botocore's client to this bucket, tried again; `doing` and `key` say what it is for."""
        return self.run(lambda: self.once(doing, key, request, **given), stop)

    def run(self, call: Callable[[], T], stop: threading.Event | None = None) -> T:
        """`call` makes requests by `once`, and may be made again."""
        return self.backoff.run(lambda: self._with_fresh_credentials(call), stop)

    def once(self, doing: str, key: str, request: str, **given: Any) -> Any:
        with reporting(doing, self.url, key):
            return getattr(self._client, request)(Bucket=self.name, **given)

    def pages(self, doing: str, key: str, request: str, follow: Mapping[str, str], **given: Any) -> Iterator[Any]:
        """The answers to a listing request; `follow`: what the next one is given, and what names it in the answer."""
        while True:
            page = self.ask(doing, key, request, **given)
            yield page
            if not page.get("IsTruncated"):
                return
            given |= {name: page[field] for name, field in follow.items()}

    def _with_fresh_credentials(self, call: Callable[[], T]) -> T:
        client = self._client
        try:
            return call()
        except ExpiredCredentialsError:
            with self._renewing:
                if self._client is client:
                    self._client = self.options.client()
        return call()


class Body:
    """Buffers side by side as one file that botocore sends without copying them.

    `read` gives the next view, of up to SLICE_BYTES, and not the length asked for: the views go to the socket as they
    are. botocore asks before it sends a file ("Expect: 100-continue"), so that a refusal is heard; bytes go at once.
    """

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        self._buffers = [view for view in buffers if view.nbytes]
        self._size = sum(view.nbytes for view in self._buffers)
        self._views = self._slices()

    def __len__(self) -> int:
        return self._size

    def read(self, size: int = -1) -> memoryview | bytes:
        return next(self._views, b"")

    def _slices(self) -> Iterator[memoryview]:
        for view in self._buffers:
            for start in range(0, view.nbytes, SLICE_BYTES):
                yield view[start : start + SLICE_BYTES]


def checksum_of(buffers: Sequence[memoryview]) -> str:
    """The CRC32C of all of them, as S3 writes it."""
    value = 0
    for view in buffers:
        if view.nbytes:
            value = crc32c(view, value)
    return base64.b64encode(value.to_bytes(4, "big")).decode()


def checksum_of_parts(checksums: Sequence[str]) -> str:
    """What S3 shows for an object that was put in parts of these checksums."""
    joined = b"".join(base64.b64decode(checksum) for checksum in checksums)
    return f"{checksum_of([memoryview(joined)])}-{len(checksums)}"
