"""One new object on its way to a bucket: whole, or in parts that several threads put."""

from __future__ import annotations

import hashlib
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from dscheck.errors import CheckpointNotFoundError, StorageError, TransientStorageError
from dscheck.storage.s3.bucket import Body, Bucket, checksum_of, checksum_of_parts
from dscheck.storage.s3.options import MIB, MOST_PARTS

if TYPE_CHECKING:
    from typing_extensions import Buffer

_MARK = "dscheck-upload"
"""User metadata by which an upload knows its object again when the answer was lost."""

_GROWS_AFTER = 1000


class Upload:
    """A PartWriter. What comes by `write` and is shorter than a part is put whole, in one request.

    Nothing is usable after a first failure. Parts may be put by several threads; the rest is for one.
    """

    def __init__(self, bucket: Bucket, key: str, path: str) -> None:
        self._bucket, self._key, self._path = bucket, key, path
        self._mark = uuid.uuid4().hex
        self._rest = bytearray()
        self._id: str | None = None
        self._parts: dict[int, dict[str, Any]] = {}
        self._sizes: dict[int, int] = {}
        self._opening = threading.Lock()
        self._under_way = 0
        self._settled = threading.Condition()
        self._usable = True
        self._given_up = threading.Event()
        self.parts_in_flight = bucket.options.requests_in_flight

    def part_bytes(self, nbytes: int) -> int:
        least = -(-nbytes // MOST_PARTS)
        return max(self._bucket.options.part_bytes, -(-least // MIB) * MIB)

    def put_part(self, number: int, buffers: Sequence[memoryview]) -> None:
        with self._putting():
            checksum = checksum_of(buffers)
            upload = self._open()
            answer = self._run(
                lambda: self._bucket.once(
                    "put a part of", self._key, "upload_part",
                    Key=self._path, UploadId=upload, PartNumber=number + 1, Body=Body(buffers), ChecksumCRC32C=checksum,
                )
            )  # fmt: skip
            self._compare(answer.get("ChecksumCRC32C"), checksum)
        self._parts[number] = {"PartNumber": number + 1, "ETag": answer["ETag"], "ChecksumCRC32C": checksum}
        self._sizes[number] = sum(view.nbytes for view in buffers)

    def write(self, data: Buffer) -> None:
        self._require_usable("write to")
        view = memoryview(data)
        self._rest += view.cast("B") if view.nbytes else b""
        while len(self._rest) >= (part := self._next_part_bytes()):
            with memoryview(self._rest) as rest, rest[:part] as first:
                self.put_part(len(self._parts), [first])
            del self._rest[:part]

    def commit(self) -> int:
        self._require_usable("commit")
        if self._id is not None and self._rest:
            with memoryview(self._rest) as rest:
                self.put_part(len(self._parts), [rest])
            self._rest = bytearray()
        self._usable = False
        self._refuse_other()
        size = sum(self._sizes.values()) + len(self._rest)
        checksum = self._put_whole(size) if self._id is None else self._complete(size)
        self._check(self._head(), size, checksum)
        self._id = None
        return size

    def abort(self) -> None:
        self._give_up()
        with self._settled:
            # A part that arrives after the request to give up might be kept for ever.
            self._settled.wait_for(lambda: not self._under_way)
        upload, self._id = self._id, None
        if upload is not None:
            with suppress(StorageError, CheckpointNotFoundError):
                self._bucket.once("give up", self._key, "abort_multipart_upload", Key=self._path, UploadId=upload)

    @contextmanager
    def _putting(self) -> Iterator[None]:
        with self._settled:
            self._require_usable("put a part of")
            self._under_way += 1
        try:
            yield
        except BaseException:
            self._give_up()
            raise
        finally:
            with self._settled:
                self._under_way -= 1
                self._settled.notify_all()

    def _open(self) -> str:
        with self._opening:
            if self._id is None:
                answer = self._bucket.ask(
                    "start", self._key, "create_multipart_upload", self._given_up,
                    Key=self._path, Metadata={_MARK: self._mark}, ChecksumAlgorithm="CRC32C",
                )  # fmt: skip
                self._id = str(answer["UploadId"])
            return self._id

    def _refuse_other(self) -> None:
        """Some stores ignore the condition, or know none for objects of parts: whoever was faster is still seen."""
        try:
            self._head()
        except CheckpointNotFoundError:
            return
        raise self._error("another writer has created it, and no object is overwritten")

    def _put_whole(self, size: int) -> str:
        data, metadata = bytes(self._rest), {_MARK: self._mark}
        checksum = checksum_of([memoryview(data)])
        self._create(
            lambda: self._bucket.once(
                "create", self._key, "put_object",
                Key=self._path, IfNoneMatch="*", Body=data, Metadata=metadata, ChecksumCRC32C=checksum,
            ),
            size,
            checksum,
        )  # fmt: skip
        return checksum

    def _complete(self, size: int) -> str:
        parts = [self._parts[number] for number in sorted(self._parts)]
        if [part["PartNumber"] for part in parts] != [*range(1, len(parts) + 1)]:
            raise self._error(f"parts are missing: {len(parts)} were put, up to number {parts[-1]['PartNumber']}")
        checksum = checksum_of_parts([part["ChecksumCRC32C"] for part in parts])
        self._create(
            lambda: self._bucket.once(
                "commit", self._key, "complete_multipart_upload",
                Key=self._path, IfNoneMatch="*", UploadId=self._id, MultipartUpload={"Parts": parts},
            ),
            size,
            checksum,
        )  # fmt: skip
        return checksum

    def _create(self, request: Callable[[], object], size: int, checksum: str) -> None:
        """`request` creates the object unless it is there, and an earlier try that lost its answer counts."""
        unsure = False

        def create() -> None:
            nonlocal unsure
            try:
                request()
            except TransientStorageError:
                unsure = True
                raise
            except StorageError:
                if not (unsure and self._is_there(size, checksum)):
                    raise

        self._run(create)

    def _is_there(self, size: int, checksum: str) -> bool:
        """Whether the object is ours: by its mark, or by its ETag where a store keeps no metadata."""
        try:
            found = self._head()
            self._check(found, size, checksum)
        except (CheckpointNotFoundError, StorageError):
            return False
        mark = found["Metadata"].get(_MARK)
        return bool(found["ETag"].strip('"') == self._etag() if mark is None else mark == self._mark)

    def _etag(self) -> str:
        """What most stores make of the MD5 of an object or of its parts."""
        if self._id is None:
            return hashlib.md5(self._rest, usedforsecurity=False).hexdigest()
        tags = [self._parts[number]["ETag"].strip('"') for number in sorted(self._parts)]
        try:
            joined = bytes.fromhex("".join(tags))
        except ValueError:
            return "unknown"
        return f"{hashlib.md5(joined, usedforsecurity=False).hexdigest()}-{len(tags)}"

    def _check(self, found: Mapping[str, Any], size: int, checksum: str) -> None:
        if found["ContentLength"] != size:
            raise self._error(f"{size} bytes were put, and the store holds {found['ContentLength']}")
        self._compare(found.get("ChecksumCRC32C"), checksum)

    def _head(self) -> Any:
        return self._bucket.ask(
            "look for", self._key, "head_object", self._given_up, Key=self._path, ChecksumMode="ENABLED"
        )

    def _run(self, call: Callable[[], Any]) -> Any:
        return self._bucket.run(call, self._given_up)

    def _next_part_bytes(self) -> int:
        """Of an object whose end is not known: longer and longer, so that MOST_PARTS are enough for 16 TB."""
        return self._bucket.options.part_bytes << (len(self._parts) // _GROWS_AFTER)

    def _compare(self, stored: str | None, computed: str) -> None:
        """Some stores show no checksum, and some another kind for an object of parts."""
        if stored is not None and ("-" in stored) == ("-" in computed) and stored != computed:
            raise self._error(f"crc32c {computed} was put, and the store holds {stored} (base64)")

    def _give_up(self) -> None:
        self._usable = False
        self._given_up.set()

    def _require_usable(self, doing: str) -> None:
        if not self._usable:
            raise self._error(f"cannot {doing} it: it was committed, given up, or failed before")

    def _error(self, what: str) -> StorageError:
        url = self._bucket.url
        return StorageError(f"'{url}/{self._key}': {what}", url=url, key=self._key)
