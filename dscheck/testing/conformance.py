"""The facts that every storage must satisfy. A back end inherits the class and gives two fixtures:

    class TestMyStorage(StorageConformance):
        @pytest.fixture
        def storage(self): ...          # an empty one for each test
        @pytest.fixture
        def raw(self, storage): ...     # key -> its bytes, or None, read through the medium and not through the storage
        @pytest.fixture
        def other(self, storage): ...   # the same root, as another process opens it; optional

A back end whose store has no put-if-absent gives `dscheck.commit.SingleWriter(...)` of it, and sets
`conditional = False`: of several who put at once, more than one may then win.

The facts hold on object stores too: none asks whether an object shows before it is committed.
"""

from __future__ import annotations

import array
import hashlib
import itertools
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from dscheck.errors import CheckpointNotFoundError, CorruptCheckpointError, DscheckError, StorageError
from dscheck.storage.base import Entry, ObjectWriter, Storage

Raw = Callable[[str], bytes | None]

TEXT = bytes(range(256)) * 3
BAD_KEYS = [
    "",
    "/a",
    "a/",
    "a//b",
    ".",
    "..",
    "../a",
    "a/../b",
    "a/./b",
    ".a",
    "a/.b/c",
    "a\\b",
    "a\0",
    "a\nb",
    "\ud800",
]


def write_object(storage: Storage, key: str, *pieces: bytes) -> int:
    """Create `key` from `pieces` and commit it; its size."""
    writer = storage.create(key)
    for piece in pieces:
        writer.write(piece)
    return writer.commit()


def listed(storage: Storage, prefix: str = "") -> dict[str, int]:
    """The sizes below `prefix` by key, each key once."""
    entries = list(storage.list(prefix))
    sizes = {entry.key: entry.size for entry in entries}
    assert len(sizes) == len(entries)
    return sizes


class StorageConformance:
    """Inherit it, give the fixtures `storage` and `raw`. Slow back ends lower the numbers."""

    conditional = True
    race_rounds = 40
    race_threads = 16
    large_bytes = 40 << 20
    listed_objects = 1100
    """More than a page of any object store's listing."""

    @pytest.fixture
    def other(self, storage: Storage) -> Storage:
        return storage

    # put_if_absent

    def test_put_creates_exactly_its_bytes(self, storage: Storage, raw: Raw) -> None:
        assert storage.put_if_absent("records/1-1.json", TEXT) is True
        assert raw("records/1-1.json") == storage.read("records/1-1.json") == TEXT

    def test_second_put_returns_false_and_changes_nothing(self, storage: Storage, raw: Raw) -> None:
        storage.put_if_absent("a/b", b"first")
        assert storage.put_if_absent("a/b", b"second, longer") is False
        assert storage.put_if_absent("a/b", b"first") is False
        assert raw("a/b") == b"first"
        assert listed(storage) == {"a/b": 5}

    def test_put_of_a_created_object_returns_false(self, storage: Storage, raw: Raw) -> None:
        write_object(storage, "a/b", b"first")
        assert storage.put_if_absent("a/b", b"second") is False
        assert raw("a/b") == b"first"

    def test_empty_objects_exist(self, storage: Storage, raw: Raw) -> None:
        assert storage.put_if_absent("put", b"") is True
        assert storage.put_if_absent("put", b"x") is False
        assert write_object(storage, "created") == 0
        assert write_object(storage, "written", b"", b"") == 0
        for key in ("put", "created", "written"):
            assert raw(key) == storage.read(key) == b""
            storage.read_into(key, 0, memoryview(bytearray()))
        assert listed(storage) == {"put": 0, "created": 0, "written": 0}

    def test_of_many_racing_puts_exactly_one_wins(self, storage: Storage, raw: Raw) -> None:
        barrier = threading.Barrier(self.race_threads, timeout=60)
        keys = [f"race/{number}" for number in range(self.race_rounds)]

        def claims(rank: int) -> list[bool]:
            won = []
            try:
                for key in keys:
                    barrier.wait()
                    won.append(storage.put_if_absent(key, _claim(rank)))
            except StorageError:
                barrier.abort()  # the others need not wait for this one
                raise
            return won

        with ThreadPoolExecutor(self.race_threads) as pool:
            won = list(pool.map(claims, range(self.race_threads)))
        for number, key in enumerate(keys):
            winners = [rank for rank in range(self.race_threads) if won[rank][number]]
            assert len(winners) == 1 or (winners and not self.conditional), f"{key}: {winners}"
            assert raw(key) == storage.read(key)
            assert raw(key) in [_claim(rank) for rank in winners]
        assert listed(storage, "race/") == dict.fromkeys(keys, len(_claim(0)))

    def test_a_reader_sees_a_whole_put_or_none(self, storage: Storage) -> None:
        keys = [f"records/{number}-1.json" for number in range(self.race_rounds)]
        data = TEXT * 80
        finished = threading.Event()

        def watch() -> None:
            while not finished.wait(0.0005):
                for entry in storage.list("records/"):
                    assert entry.size == len(data)
                    assert storage.read(entry.key) == data

        with ThreadPoolExecutor(2) as pool:
            watchers = [pool.submit(watch) for _ in range(2)]
            try:
                for key in keys:
                    assert storage.put_if_absent(key, data)
            finally:
                finished.set()
            for watcher in watchers:
                watcher.result()

    # create, write, commit, abort

    def test_a_committed_object_holds_what_was_written_in_order(self, storage: Storage, raw: Raw) -> None:
        pieces = [b"", b"a", TEXT, b"", b"bc" * 5000, b"\0"]
        assert write_object(storage, "steps/1/1/data-0.bin", *pieces) == sum(map(len, pieces))
        assert raw("steps/1/1/data-0.bin") == storage.read("steps/1/1/data-0.bin") == b"".join(pieces)

    def test_write_takes_any_contiguous_buffer_and_keeps_none(self, storage: Storage, raw: Raw) -> None:
        numbers = array.array("d", [1.0, -0.0, 3.5])
        scratch = bytearray(b"scratch")
        expected = bytes(scratch) + numbers.tobytes() + TEXT[10:20]
        writer = storage.create("a")
        writer.write(scratch)
        scratch[:] = b"changed"
        scratch.append(0)
        writer.write(numbers)
        writer.write(memoryview(TEXT)[10:20])
        writer.write(memoryview(array.array("d")))
        assert writer.commit() == len(expected)
        assert raw("a") == expected

    def test_a_large_object_comes_back_whole(self, storage: Storage, raw: Raw) -> None:
        block = hashlib.shake_128(b"large").digest(1 << 20) + b"odd"
        sizes = [self.large_bytes // 2 + 1, 12345, self.large_bytes // 2 - 12346]
        data = (block * (sum(sizes) // len(block) + 1))[: sum(sizes)]
        bounds = [0, sizes[0], sizes[0] + sizes[1], sum(sizes)]
        pieces = [data[a:b] for a, b in itertools.pairwise(bounds)]
        assert write_object(storage, "large", *pieces) == len(data)
        assert raw("large") == data
        buffer = bytearray(len(data))
        storage.read_into("large", 0, memoryview(buffer))
        assert buffer == data
        assert storage.read("large", sizes[0] - 3, 7) == data[sizes[0] - 3 :][:7]

    def test_an_object_is_never_created_twice(self, storage: Storage, raw: Raw) -> None:
        storage.put_if_absent("put", b"first")
        write_object(storage, "created", b"first")
        for key in ("put", "created"):
            with pytest.raises(StorageError):
                write_object(storage, key, b"second")
            assert raw(key) == b"first"

    def test_of_two_writers_of_one_object_one_commits(self, storage: Storage, raw: Raw) -> None:
        outcomes = list(_start(storage, "a", 4))
        committed = [writer for writer in outcomes if writer is not None and _commits(writer)]
        assert len(committed) == 1
        assert listed(storage) == {"a": 1}
        assert raw("a") == b"x"

    def test_abort_leaves_nothing(self, storage: Storage, raw: Raw) -> None:
        for pieces in ([], [b"", b"some"], [TEXT * 100]):
            writer = storage.create("steps/1/1/data-0.bin")
            for piece in pieces:
                writer.write(piece)
            writer.abort()
            writer.abort()
            assert raw("steps/1/1/data-0.bin") is None
            assert listed(storage) == {}
        assert storage.put_if_absent("steps/1/1/data-0.bin", b"free again")

    def test_abort_after_commit_changes_nothing(self, storage: Storage, raw: Raw) -> None:
        writer = storage.create("a")
        writer.write(b"kept")
        writer.commit()
        writer.abort()
        assert raw("a") == b"kept"

    def test_a_second_abort_leaves_the_next_object_alone(self, storage: Storage, raw: Raw) -> None:
        for number in range(5):
            writer = storage.create(f"a/{number}")
            writer.write(b"given up")
            writer.abort()
            assert storage.put_if_absent(f"a/{number}", b"kept")
            writer.abort()
            assert raw(f"a/{number}") == b"kept"

    def test_a_finished_writer_takes_nothing_more(self, storage: Storage, raw: Raw) -> None:
        for finish in ("commit", "abort"):
            key = f"after-{finish}"
            writer = storage.create(key)
            writer.write(b"first")
            getattr(writer, finish)()
            before = raw(key)
            with pytest.raises(StorageError):
                writer.write(b"more")
            with pytest.raises(StorageError):
                writer.commit()
            assert raw(key) == before

    def test_writers_do_not_disturb_each_other(self, storage: Storage, raw: Raw) -> None:
        def write(rank: int) -> int:
            return write_object(storage, f"steps/1/1/data-{rank}.bin", *[_claim(rank)] * 20)

        with ThreadPoolExecutor(self.race_threads) as pool:
            sizes = list(pool.map(write, range(self.race_threads)))
        expected = {f"steps/1/1/data-{rank}.bin": size for rank, size in enumerate(sizes)}
        assert listed(storage, "steps/1/1/") == expected
        for rank in range(self.race_threads):
            assert raw(f"steps/1/1/data-{rank}.bin") == _claim(rank) * 20

    def test_an_object_deleted_under_its_writer_is_not_committed(self, storage: Storage, raw: Raw) -> None:
        writer = storage.create("a")
        writer.write(b"x")
        storage.delete("a")
        if listed(storage) == {} and _commits(writer):
            # A store may keep an upload apart until its commit: then nothing was there to delete.
            assert raw("a") == b"x"
        else:
            writer.abort()
            assert raw("a") is None

    # read, read_into

    def test_ranges_are_those_of_python_slices(self, storage: Storage) -> None:
        storage.put_if_absent("a", TEXT)
        size = len(TEXT)
        for offset in (0, 1, 255, size - 1, size):
            assert storage.read("a", offset) == TEXT[offset:]
            for length in {0, 1, 100, size - offset}:
                if offset + length <= size:
                    assert storage.read("a", offset, length) == TEXT[offset : offset + length]
                    buffer = bytearray(b"\xee" * (length + 2))
                    storage.read_into("a", offset, memoryview(buffer)[1:-1])
                    assert buffer == b"\xee" + TEXT[offset : offset + length] + b"\xee"

    def test_a_range_beyond_the_end_is_damage(self, storage: Storage) -> None:
        storage.put_if_absent("a", TEXT)
        size = len(TEXT)
        # 1 << 60: nothing may be allocated before the size is compared.
        for offset, length in ((0, size + 1), (size, 1), (size + 1, 0), (size + 1, None), (1, size), (0, 1 << 60)):
            with pytest.raises(CorruptCheckpointError, match=f"{size}"):
                storage.read("a", offset, length)
        for offset, length in ((0, size + 1), (size, 1), (size + 1, 0)):
            with pytest.raises(CorruptCheckpointError, match=f"{size}"):
                storage.read_into("a", offset, memoryview(bytearray(length)))

    def test_an_impossible_range_is_an_error(self, storage: Storage) -> None:
        storage.put_if_absent("a", TEXT)
        for offset, length in ((-1, None), (-1, 1), (0, -1), (5, -5)):
            with pytest.raises(StorageError):
                storage.read("a", offset, length)
        with pytest.raises(StorageError):
            storage.read_into("a", -1, memoryview(bytearray(1)))

    def test_a_missing_object_is_named(self, storage: Storage) -> None:
        storage.put_if_absent("records/1-1.json", b"x")
        for key in ("records/2-1.json", "terms/1.json"):
            for length in (None, 0, 1):
                with pytest.raises(CheckpointNotFoundError, match=key) as caught:
                    storage.read(key, 0, length)
                assert caught.value.fields["key"] == key
            with pytest.raises(CheckpointNotFoundError, match=key):
                storage.read_into(key, 0, memoryview(bytearray(1)))

    def test_a_folder_is_no_object(self, storage: Storage, raw: Raw) -> None:
        storage.put_if_absent("steps/1/1/data-0.bin", b"x")
        for folder in ("steps", "steps/1"):
            with pytest.raises(DscheckError):
                storage.read(folder)
        assert raw("steps/1/1/data-0.bin") == b"x"

    def test_many_threads_read_one_object(self, storage: Storage) -> None:
        data = TEXT * 1000
        storage.put_if_absent("a", data)

        def read(start: int) -> bool:
            buffer = bytearray(5000)
            for offset in range(start, start + 20000, 500):
                storage.read_into("a", offset, memoryview(buffer))
                assert buffer == data[offset : offset + 5000] == storage.read("a", offset, 5000)
            return True

        with ThreadPoolExecutor(self.race_threads) as pool:
            assert all(pool.map(read, range(self.race_threads)))

    # list, delete

    def test_list_gives_what_lies_below_a_folder(self, storage: Storage) -> None:
        sizes = {"records/1-1.json": 1, "records/10-1.json": 2, "recordsX/1": 3, "steps/1/1/data-0.bin": 4, "top": 5}
        for key, size in sizes.items():
            storage.put_if_absent(key, bytes(size))
        for prefix in ("", "records/", "steps/", "steps/1/", "steps/1/1/", "none/", "steps/2/1/", "rec", "records/1"):
            assert listed(storage, prefix) == {key: n for key, n in sizes.items() if key.startswith(prefix)}

    def test_a_listing_has_entries(self, storage: Storage) -> None:
        assert list(storage.list("")) == []
        storage.put_if_absent("a/b", b"xyz")
        assert list(storage.list("a/")) == [Entry("a/b", 3)]

    def test_many_objects_are_listed_once_each(self, storage: Storage) -> None:
        keys = {f"records/{number}-1.json" for number in range(self.listed_objects)}
        with ThreadPoolExecutor(self.race_threads) as pool:
            assert all(pool.map(lambda key: storage.put_if_absent(key, b"x"), keys))
        assert listed(storage, "records/") == dict.fromkeys(keys, 1)

    def test_another_process_sees_what_was_done_at_once(self, storage: Storage, other: Storage, raw: Raw) -> None:
        for number in range(3):
            assert listed(other, "records/") == {f"records/{n}-1.json": 1 for n in range(number)}
            assert storage.put_if_absent(f"records/{number}-1.json", b"x")
            assert other.read(f"records/{number}-1.json") == raw(f"records/{number}-1.json") == b"x"
            assert other.put_if_absent(f"records/{number}-1.json", b"y") is False
        write_object(storage, "steps/1/1/data-0.bin", TEXT)
        assert listed(other, "steps/") == {"steps/1/1/data-0.bin": len(TEXT)}
        with pytest.raises(StorageError):
            write_object(other, "steps/1/1/data-0.bin", b"second")
        other.delete("records/1-1.json")
        assert listed(storage, "records/") == {"records/0-1.json": 1, "records/2-1.json": 1}
        with pytest.raises(CheckpointNotFoundError):
            storage.read("records/1-1.json")
        del storage
        assert other.read("steps/1/1/data-0.bin", 3, 5) == TEXT[3:8]

    def test_delete_removes_one_object(self, storage: Storage, raw: Raw) -> None:
        for key in ("a/b", "a/bc", "a/d/e"):
            storage.put_if_absent(key, b"x")
        storage.delete("a/b")
        storage.delete("a/b")
        storage.delete("never/was/there")
        assert raw("a/b") is None
        assert listed(storage) == {"a/bc": 1, "a/d/e": 1}
        with pytest.raises(CheckpointNotFoundError):
            storage.read("a/b")
        assert storage.put_if_absent("a/b", b"new") is True
        assert raw("a/b") == b"new"

    # keys, errors

    @pytest.mark.parametrize("key", BAD_KEYS)
    def test_a_key_that_might_leave_the_root_is_refused(self, storage: Storage, key: str) -> None:
        with pytest.raises(StorageError):
            storage.put_if_absent(key, b"x")
        with pytest.raises(StorageError):
            storage.create(key)
        with pytest.raises(StorageError):
            storage.read(key)
        with pytest.raises(StorageError):
            storage.read_into(key, 0, memoryview(bytearray(1)))
        with pytest.raises(StorageError):
            storage.delete(key)
        assert listed(storage) == {}

    @pytest.mark.parametrize("prefix", ["/", "../", "a/../", "a//", ".a/", "a/.b", "a\\", "a\0/"])
    def test_a_prefix_that_begins_no_key_is_refused(self, storage: Storage, prefix: str) -> None:
        with pytest.raises(StorageError):
            list(storage.list(prefix))

    def test_too_long_keys_are_refused(self, storage: Storage) -> None:
        for key in ("x" * 256, "ü" * 128, "/".join(["x" * 250] * 5)):
            with pytest.raises(StorageError, match="at most"):
                storage.put_if_absent(key, b"x")
        assert storage.put_if_absent("x" * 255, b"x")

    @pytest.mark.parametrize(
        "key", ["schritt/größe-7", "検/查", "a b/c+d%20&=?#~*", "a:b/@{}'\"", "a..b/c.", "\U0001f4be"]
    )
    def test_unusual_keys_are_kept_as_they_are(self, storage: Storage, raw: Raw, key: str) -> None:
        assert storage.put_if_absent(key, b"x")
        assert raw(key) == storage.read(key) == b"x"
        assert listed(storage) == {key: 1}
        storage.delete(key)
        assert listed(storage) == {}

    def test_errors_pickle_and_say_where(self, storage: Storage) -> None:
        with pytest.raises(DscheckError) as caught:
            storage.read("no/such")
        again = pickle.loads(pickle.dumps(caught.value))
        assert (type(again), str(again), again.fields) == (type(caught.value), str(caught.value), caught.value.fields)
        assert again.fields == {"url": storage.url, "key": "no/such"}

    def test_it_is_a_storage_with_a_url(self, storage: Storage) -> None:
        assert isinstance(storage, Storage)
        assert storage.url


def _claim(rank: int) -> bytes:
    return b"%04d" % rank * 64


def _start(storage: Storage, key: str, count: int) -> list[ObjectWriter | None]:
    writers: list[ObjectWriter | None] = []
    for _ in range(count):
        try:
            writer = storage.create(key)
        except StorageError:
            writers.append(None)
        else:
            writer.write(b"x")
            writers.append(writer)
    return writers


def _commits(writer: ObjectWriter) -> bool:
    try:
        writer.commit()
    except StorageError:
        writer.abort()
        return False
    return True
