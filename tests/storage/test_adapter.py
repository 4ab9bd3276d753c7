"""What the adapter for fsspec finds out about a file system, and what it makes of one that fails or lies."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from dscheck import CheckpointNotFoundError, CorruptCheckpointError, StorageError
from dscheck.storage import Storage, open_storage
from dscheck.storage.adapter import FsspecStorage
from dscheck.storage.base import MayLackCondition
from tests.storage.file_systems import Attic, Cloud, Shelf, Vault


@pytest.fixture(autouse=True)
def emptied() -> Iterator[None]:
    yield
    Cloud.objects.clear()
    Cloud.broken.clear()
    Vault.store.clear()


def opened(file_system: type, place: str = "bucket/run", **options: Any) -> FsspecStorage:
    fsspec.register_implementation(file_system.protocol, file_system, clobber=True)
    storage = open_storage(f"{file_system.protocol}://{place}", options)
    assert isinstance(storage, FsspecStorage)
    return storage


class Ignorant(Cloud):
    """A gateway that ignores the condition."""

    protocol = "ignorant"

    async def _pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        await super()._pipe_file(path, value)


class Looking(Cloud):
    """A package that looks whether a name is free, and puts then."""

    protocol = "looking"

    async def _pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        if mode == "create" and await self._exists(path):
            raise FileExistsError(path)
        await super()._pipe_file(path, value)


class Racing(Cloud):
    """A server whose condition holds in sequence alone. Its look cannot be blinded; of two at once both look first."""

    protocol = "racing"

    async def _pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        import asyncio

        taken = self._strip_protocol(path) in self.objects
        await asyncio.sleep(0.02)
        if mode == "create" and taken:
            raise FileExistsError(path)
        await super()._pipe_file(path, value)


class Refusing(Cloud):
    """A put that loses is told by HTTP's 412, below an error of another kind."""

    protocol = "refusing"

    async def _pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        try:
            await super()._pipe_file(path, value, mode)
        except FileExistsError:
            cause = RuntimeError("At least one of the pre-conditions you specified did not hold")
            cause.response = {"ResponseMetadata": {"HTTPStatusCode": 412}}  # type: ignore[attr-defined]
            raise OSError(22, "precondition") from cause


@pytest.mark.parametrize("file_system", [Cloud, Refusing])
def test_a_condition_that_holds_is_used(file_system: type) -> None:
    storage = opened(file_system)
    assert isinstance(storage, MayLackCondition)
    assert storage.lacks_condition() is None
    assert [storage.put_if_absent("a", data) for data in (b"first", b"second")] == [True, False]
    assert Cloud.objects == {"bucket/run/a": b"first"}


@pytest.mark.parametrize(
    ("file_system", "seen"),
    [
        (Ignorant, "a second put replaced the first one"),
        (Looking, "a second put replaced the first one, as soon as it did not see it"),
        (Racing, "of two puts at once 2 won, in round 1"),
        (Vault, "a second put replaced the first one, as soon as it did not see it"),
    ],
)
def test_what_only_passes_for_a_condition_is_found_out(file_system: type, seen: str) -> None:
    storage = opened(file_system)
    assert seen in (storage.lacks_condition() or "")
    assert [storage.put_if_absent("a", data) for data in (b"first", b"second")] == [True, True]
    assert storage.read("a") == b"second"
    assert [name for name in (*Cloud.objects, *Vault.store) if ".put-" in name] == []


def test_a_rename_is_a_condition_where_it_does_not_replace(tmp_path: Path) -> None:
    shelf, attic = opened(Shelf, f"{tmp_path}/shelf"), opened(Attic, f"{tmp_path}/attic")
    assert shelf.lacks_condition() is None
    assert "rename: a second put replaced" in (attic.lacks_condition() or "")
    assert [shelf.put_if_absent("a", data) for data in (b"first", b"second")] == [True, False]
    assert [attic.put_if_absent("a", data) for data in (b"first", b"second")] == [True, True]
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["a", "a"]


def test_opening_and_reading_tries_nothing_and_creates_nothing(tmp_path: Path) -> None:
    storage = opened(Attic, f"{tmp_path}/run")
    assert list(storage.list("records/")) == []
    with pytest.raises(CheckpointNotFoundError):
        storage.read("records/1-1.json")
    storage.delete("records/1-1.json")
    assert list(tmp_path.iterdir()) == []


def test_listings_that_the_package_would_keep_are_asked_for_anew() -> None:
    storage = opened(Cloud)
    Cloud.objects["bucket/run/records/1-1.json"] = b"x"
    assert [entry.key for entry in storage.list("records/")] == ["records/1-1.json"]
    Cloud.objects["bucket/run/records/2-1.json"] = b"xy"
    assert [(entry.key, entry.size) for entry in storage.list("records/")] == [
        ("records/1-1.json", 1),
        ("records/2-1.json", 2),
    ]


@pytest.mark.parametrize("verb", ["list", "look"])
def test_a_listing_that_fails_is_no_empty_one(verb: str) -> None:
    """C15: damaged or unknown is never "not there"."""
    storage = opened(Cloud)
    storage.put_if_absent("records/1-1.json", b"x")
    Cloud.broken.add(verb)
    with pytest.raises(StorageError, match="cannot list 'cloud://bucket/run/records/'"):
        list(storage.list("records/"))


@pytest.mark.parametrize("verb", ["get", "look"])
def test_a_read_that_fails_is_not_that_nothing_is_there(verb: str) -> None:
    storage = opened(Cloud)
    storage.put_if_absent("a", b"x")
    Cloud.broken |= {verb, "get"}
    with pytest.raises(StorageError, match="cannot read 'cloud://bucket/run/a': PermissionError"):
        storage.read("a")


def test_a_look_that_fails_is_no_leave_to_write_over() -> None:
    storage = opened(Cloud)
    Cloud.broken.add("look")
    with pytest.raises(StorageError, match="cannot create"):
        storage.create("a")


class Short(Cloud):
    """Answers end before all that was asked for."""

    protocol = "short"

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        return (await super()._cat_file(path, start, end))[:-1]


def test_an_answer_that_is_too_short_is_an_error_and_no_damage() -> None:
    storage = opened(Short)
    Cloud.objects["bucket/run/a"] = bytes(100)
    with pytest.raises(StorageError, match="9 bytes came of 10 at 5"):
        storage.read("a", 5, 10)
    with pytest.raises(CorruptCheckpointError, match="ends at byte 100"):
        storage.read("a", 95, 10)


@pytest.mark.parametrize("mib", [0, 3])
def test_an_upload_that_was_dropped_never_completes(mib: int) -> None:
    """The finalizer of fsspec's file would complete it, and a killed save's half would look whole."""
    storage = opened(Cloud)
    writer = storage.create("steps/1/1/data-0.bin")
    writer.write(bytes((mib << 20) + 10))
    del writer
    gc.collect()
    assert Cloud.objects == {}


def test_an_upload_that_failed_never_completes() -> None:
    storage = opened(Cloud)
    writer = storage.create("a")
    Cloud.broken.add("upload")
    with pytest.raises(StorageError, match="cannot write to 'cloud://bucket/run/a': PermissionError"):
        writer.write(bytes(3 << 20))
    Cloud.broken.clear()
    with pytest.raises(StorageError, match="failed before"):
        writer.commit()
    with pytest.raises(StorageError, match="failed before"):
        writer.write(b"x")
    writer.abort()
    del writer
    gc.collect()
    assert Cloud.objects == {}


def test_an_upload_does_not_replace_what_came_meanwhile() -> None:
    storage = opened(Cloud)
    writer = storage.create("a")
    writer.write(b"mine")
    Cloud.objects["bucket/run/a"] = b"theirs"
    with pytest.raises(StorageError, match="another writer has made it meanwhile"):
        writer.commit()
    writer.abort()
    assert Cloud.objects == {"bucket/run/a": b"theirs"}


class Losing(Cloud):
    """Says that all was stored, and has less."""

    protocol = "losing"

    async def _info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        info = await super()._info(path)
        return info | {"size": info["size"] - 1 if info["size"] else 0}


def test_a_commit_looks_what_was_stored() -> None:
    writer = opened(Losing).create("a")
    writer.write(b"1234")
    with pytest.raises(StorageError, match="4 bytes were written, and the object holds 3"):
        writer.commit()


class Sizeless(Cloud):
    protocol = "sizeless"

    async def _info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        return await super()._info(path) | {"size": None}


def test_a_store_that_tells_no_sizes_is_refused() -> None:
    storage = opened(Sizeless)
    Cloud.objects["bucket/run/records/1-1.json"] = b"x"
    with pytest.raises(StorageError, match="does not say how many bytes"):
        list(storage.list("records/"))


def test_what_is_neither_file_nor_folder_is_not_passed_over(tmp_path: Path) -> None:
    """C15: a step must not seem to be gone."""
    storage = opened(Attic, f"{tmp_path}/run")
    storage.put_if_absent("records/1-1.json", b"x")
    os.mkfifo(tmp_path / "run" / "records" / "2-1.json")
    with pytest.raises(StorageError, match="neither a file nor a directory"):
        list(storage.list("records/"))


def test_threads_do_not_share_a_file_system_that_is_not_made_for_it() -> None:
    """fsspec promises no more than one thread for those that are not asynchronous inside."""
    from concurrent.futures import ThreadPoolExecutor

    vault, cloud = opened(Vault), opened(Cloud)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: id(vault._fs)).result() != id(vault._fs)
        assert pool.submit(lambda: id(cloud._fs)).result() == id(cloud._fs)
    assert vault._fs is vault._fs


class Hasty(Attic):
    """As over SFTP: looks whether a folder is there, and makes it then; another has made it meanwhile."""

    protocol = "hasty"

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        super().makedirs(path, exist_ok=True)
        raise OSError("File exists")


def test_a_folder_that_another_made_meanwhile_is_as_good(tmp_path: Path) -> None:
    assert opened(Hasty, f"{tmp_path}/run").put_if_absent("records/1-1.json", b"x")
    assert (tmp_path / "run" / "records" / "1-1.json").read_bytes() == b"x"


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_bytes(b"a file")
    with pytest.raises(StorageError, match="cannot create"):
        opened(Attic, f"{tmp_path}/run").put_if_absent("records/1-1.json", b"x")


class Plain(Vault):
    """What fsspec offers whoever brings nothing of their own."""

    protocol = "plain"
    pipe_file = fsspec.AbstractFileSystem.pipe_file


def test_what_fsspec_offers_by_default_is_not_even_tried() -> None:
    assert "it only looks before it writes" in (opened(Plain).lacks_condition() or "")


def test_a_root_with_a_closing_slash_is_the_same_root() -> None:
    one, other = (open_storage(f"cloud://bucket/run{end}") for end in ("", "/"))
    assert one.url == other.url == "cloud://bucket/run"
    assert one.put_if_absent("a", b"x")
    assert other.read("a") == b"x"


def test_a_missing_bucket_is_not_made() -> None:
    """A store that has folders in its listings alone is not asked to make one, although it can rename: it would make a
    bucket.
    """

    class Making(Cloud):
        protocol = "making"

        def makedirs(self, path: str, exist_ok: bool = False) -> None:
            raise AssertionError(path)

        def mv(self, path1: str, path2: str, **kwargs: Any) -> None:
            raise AssertionError(path1)

    storage: Storage = opened(Making)
    assert storage.put_if_absent("steps/1/1/files.arrow", b"x")
    writer = storage.create("steps/1/1/data-0.bin")
    writer.write(b"x")
    assert writer.commit() == 1
