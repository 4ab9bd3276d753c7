"""S3Storage: the six verbs, each a request or two."""

from __future__ import annotations

import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from botocore.exceptions import ClientError

from dscheck.errors import CheckpointNotFoundError, ConfigError, StorageError, TransientStorageError
from dscheck.storage.base import Entry, PartWriter
from dscheck.storage.keys import MAX_KEY_BYTES, check_key, check_prefix, check_range
from dscheck.storage.s3.bucket import SLICE_BYTES, Bucket, checksum_of
from dscheck.storage.s3.failures import reporting, status_of
from dscheck.storage.s3.options import S3Options
from dscheck.storage.s3.upload import Upload

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_TOTAL = re.compile(r"bytes \d+-\d+/(\d+)")


@dataclass(frozen=True, slots=True)
class Unfinished:
    """An upload that somebody has begun and neither completed nor given up, since `began` (Unix time)."""

    key: str
    id: str
    began: float


class S3Storage:
    """A Storage below `bucket/prefix`. The bucket must exist; nothing is asked of it before the first verb.

    `options`: as `S3Options` says. Raises ConfigError.
    """

    def __init__(self, root: str, options: Mapping[str, Any] | None = None) -> None:
        bucket, _, prefix = root.partition("/")
        prefix = prefix.strip("/")
        if not _BUCKET.fullmatch(bucket):
            # What stands there may be a key and its secret.
            raise ConfigError("an s3:// root is s3://bucket/prefix; credentials and endpoint go into storage_options")
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        if prefix:
            check_key(self.url, prefix)
        self._prefix = f"{prefix}/" if prefix else ""
        self._bucket = Bucket(bucket, self.url, S3Options.of(options or {}))
        self._trying = threading.Lock()
        self._tried: tuple[str | None] | None = None

    @property
    def requests_in_flight(self) -> int:
        return self._bucket.options.requests_in_flight

    def lacks_condition(self) -> str | None:
        with self._trying:
            if self._tried is None:
                self._tried = (self._try_condition(),)
            return self._tried[0]

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return self._put_new(key, self._path(key), data)

    def _put_new(self, key: str, path: str, data: bytes) -> bool:
        checksum = checksum_of([memoryview(data)])

        def put() -> bool:
            try:
                self._bucket.once(
                    "create", key, "put_object",
                    Key=path, Body=data, IfNoneMatch="*", ChecksumCRC32C=checksum,
                )  # fmt: skip
            except StorageError as error:
                if isinstance(error.__cause__, ClientError) and status_of(error.__cause__) == 412:
                    return False
                raise
            return True

        return self._bucket.run(put)

    def create(self, key: str) -> PartWriter:
        path = self._path(key)
        if self._size(key) is not None:
            raise StorageError(f"'{self.url}/{key}' exists, and no object is overwritten", url=self.url, key=key)
        return Upload(self._bucket, key, path)

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        found = bytearray()

        def room(nbytes: int) -> memoryview:
            found.extend(bytes(nbytes))
            return memoryview(found)

        self._fetch(key, offset, length, room)
        return bytes(found)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        self._fetch(key, offset, buffer.nbytes, lambda nbytes: buffer.cast("B") if nbytes else buffer)

    def list(self, prefix: str) -> Iterator[Entry]:
        check_prefix(self.url, prefix)
        follow = {"ContinuationToken": "NextContinuationToken"}
        for page in self._bucket.pages("list", prefix, "list_objects_v2", follow, Prefix=self._prefix + prefix):
            for found in page.get("Contents", ()):
                key = found["Key"].removeprefix(self._prefix)
                # Some stores list folders, as empty objects with a slash at the end.
                if not key.endswith("/") and not any(part.startswith(".") for part in key.split("/")):
                    yield Entry(key, found["Size"])

    def delete(self, key: str) -> None:
        self._bucket.ask("delete", key, "delete_object", Key=self._path(key))

    def unfinished(self, prefix: str) -> Iterator[Unfinished]:
        check_prefix(self.url, prefix)
        follow = {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"}
        asked = self._bucket.pages("list", prefix, "list_multipart_uploads", follow, Prefix=self._prefix + prefix)
        for page in asked:
            for found in page.get("Uploads", ()):
                key = found["Key"].removeprefix(self._prefix)
                yield Unfinished(key, found["UploadId"], found["Initiated"].timestamp())

    def abort_unfinished(self, prefix: str, older_than_s: float) -> int:
        before = time.time() - older_than_s
        found = [upload for upload in self.unfinished(prefix) if upload.began <= before]
        for upload in found:
            self._abort(upload)
        return len(found)

    def _try_condition(self) -> str | None:
        """Puts under a name that no listing shows: one after the other, then two at once."""
        name = f".put-{uuid.uuid4().hex}"
        path = self._prefix + name
        try:
            self._put_new(name, path, b"first")
            if self._put_new(name, path, b"second"):
                return "a second PUT with `If-None-Match: *` replaced the first one"
            self._bucket.ask("delete", name, "delete_object", Key=path)
            start = threading.Barrier(2, timeout=60)

            def rival(data: bytes) -> bool:
                start.wait()
                return self._put_new(name, path, data)

            with ThreadPoolExecutor(2) as pool:
                winners = sum(pool.map(rival, (b"one", b"other")))
            return None if winners < 2 else "two PUTs at once with `If-None-Match: *` both won"
        finally:
            self._bucket.ask("delete", name, "delete_object", Key=path)

    def _abort(self, upload: Unfinished) -> None:
        path = self._path(upload.key)
        try:
            self._bucket.ask("give up", upload.key, "abort_multipart_upload", Key=path, UploadId=upload.id)
        except StorageError as error:
            if not (isinstance(error.__cause__, ClientError) and status_of(error.__cause__) == 404):
                raise

    def _path(self, key: str) -> str:
        check_key(self.url, key)
        if len((self._prefix + key).encode()) > MAX_KEY_BYTES:
            raise StorageError(
                f"{key!r} is no key of '{self.url}': at most {MAX_KEY_BYTES} bytes, the root's included, fit S3",
                url=self.url,
                key=key,
            )
        return self._prefix + key

    def _size(self, key: str) -> int | None:
        try:
            return int(self._bucket.ask("look for", key, "head_object", Key=self._path(key))["ContentLength"])
        except CheckpointNotFoundError:
            return None

    def _fetch(self, key: str, offset: int, length: int | None, room: Callable[[int], memoryview]) -> None:
        """Bytes [offset, offset + length) into what `room` makes for them, once their number is known.

        A range that breaks off is asked for again from there.
        """
        if offset < 0 or (length or 0) < 0:
            check_range(self.url, key, offset, length, 0)
        if length == 0:
            size = self._size(key)
            if size is None:
                raise CheckpointNotFoundError(f"there is no object '{self.url}/{key}'", url=self.url, key=key)
            check_range(self.url, key, offset, 0, size)
            room(0)
            return
        path, view, done = self._path(key), None, 0

        def fetch() -> None:
            nonlocal view, done
            stop = "" if length is None else offset + length - 1
            size, body = self._get(key, path, offset + done, stop)
            with closing(body):
                check_range(self.url, key, offset, length, size)
                if view is None:
                    view = room(size - offset if length is None else length)
                with reporting("read", self.url, key):
                    while done < view.nbytes:
                        count = body.readinto(view[done : done + SLICE_BYTES])
                        if not count:
                            raise TransientStorageError(
                                f"reading '{self.url}/{key}' broke off at byte {offset + done}", url=self.url, key=key
                            )
                        done += count

        self._bucket.run(fetch)

    def _get(self, key: str, path: str, start: int, stop: int | str) -> tuple[int, Any]:
        """The size of the object, and its bytes from `start` to `stop`, included, or its end."""
        whole = start == 0 and stop == ""
        wanted = {} if whole else {"Range": f"bytes={start}-{stop}"}
        try:
            answer = self._bucket.once("read", key, "get_object", Key=path, **wanted)
        except StorageError as error:
            size = self._size(key) if _is_beyond(error) else None
            if size is None:
                raise
            if size == start and stop == "":
                return size, _Nothing()
            check_range(self.url, key, start, 1, size)
            raise
        total = _TOTAL.fullmatch(answer.get("ContentRange", ""))
        if total is None and not whole and not (start == 0 and answer["ContentLength"] <= int(stop or 0) + 1):
            answer["Body"].close()
            raise StorageError(
                f"'{self.url}/{key}': the store sends {answer['ContentLength']} bytes where a range was asked for",
                url=self.url,
                key=key,
            )
        return int(total.group(1) if total else answer["ContentLength"]), answer["Body"]


class _Nothing:
    """The body of an empty rest."""

    def readinto(self, buffer: memoryview) -> int:
        return 0

    def close(self) -> None: ...


def _is_beyond(error: StorageError) -> bool:
    return isinstance(error.__cause__, ClientError) and status_of(error.__cause__) == 416
