"""What a network, a server and wrong rights do to S3Storage, by a proxy and by kills: every byte still counts."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dscheck.errors import CheckpointNotFoundError, ConfigError, StorageError, TransientStorageError
from dscheck.storage.base import PartWriter
from dscheck.storage.s3 import S3Storage
from dscheck.testing.servers import JuiceFS, S3Server, SeaweedFS
from tests.storage.s3_proxy import Fate, Proxy

MIB = 1 << 20
PART = 5 * MIB
NOISE = np.random.default_rng(5).integers(0, 256, 4 * PART + 12345, dtype=np.uint8)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    users = {"reader": ("readersecret", ["Read:ckpt", "List:ckpt"]), "nobody": ("nobodysecret", ["Read:other"])}
    with SeaweedFS(tmp_path_factory.mktemp("weed"), users) as server:
        server.make_bucket("ckpt")
        yield server


def root() -> str:
    return f"ckpt/{uuid.uuid4().hex}"


def through(proxy: Proxy, server: S3Server, patience_s: float = 30.0) -> S3Storage:
    options = server.options | {"endpoint_url": proxy.endpoint, "part_bytes": PART, "patience_s": patience_s}
    return S3Storage(root(), options)


def put(storage: S3Storage, key: str, data: memoryview, threads: int = 4) -> int:
    """`data` in parts, several at once."""
    writer = storage.create(key)
    assert isinstance(writer, PartWriter)
    numbers, failures = iter(range(-(-len(data) // PART))), []

    def run() -> None:
        try:
            for number in numbers:
                part = data[number * PART : (number + 1) * PART]
                writer.put_part(number, [part[:100], part[100:]])
        except StorageError as error:
            failures.append(error)

    running = [threading.Thread(target=run) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if failures:
        writer.abort()
        raise failures[0]
    return writer.commit()


def now_and_then(fate: Fate, *, every: int) -> Callable[[str, str], Fate]:
    numbers = random.Random(3)
    return lambda method, path: fate if numbers.randrange(every) == 0 else "pass"


def once(fate: Fate, method: str, part: str = "") -> Callable[[str, str], Fate]:
    """The first request of this method whose path contains `part`."""
    left = [fate]
    return lambda was, path: left.pop() if left and was == method and part in path else "pass"


@pytest.mark.parametrize("fate", ["slow down", "drop", "lose"])
def test_a_save_and_a_load_go_through_a_network_that_fails_now_and_then(server: SeaweedFS, fate: Fate) -> None:
    with Proxy(server.endpoint, now_and_then(fate, every=4)) as proxy:
        storage = through(proxy, server)
        for number in range(5):
            assert put(storage, f"data-{number}.bin", NOISE.data) == len(NOISE)
            found = bytearray(len(NOISE))
            storage.read_into(f"data-{number}.bin", 0, memoryview(found))
            assert found == NOISE.data
        assert {entry.key: entry.size for entry in storage.list("")} == {f"data-{n}.bin": len(NOISE) for n in range(5)}
        assert proxy.seen[fate] > 5


def test_a_read_that_breaks_off_goes_on_where_it_was(server: SeaweedFS) -> None:
    with Proxy(server.endpoint, once("half", "GET", "data")) as proxy:
        storage = through(proxy, server)
        put(storage, "data", NOISE.data)
        assert storage.read("data", 7) == NOISE.data[7:]
        assert proxy.seen["half"] == 1


def test_a_lost_answer_to_a_put_shows_as_an_object_that_is_there(server: SeaweedFS) -> None:
    """The caller reads back (docs/commit.md P3, P11): what counts is that no second object replaced the first."""
    with Proxy(server.endpoint, once("lose", "PUT")) as proxy:
        storage = through(proxy, server)
        assert storage.put_if_absent("records/1-1.json", b"ours") is False
        assert storage.read("records/1-1.json") == b"ours"


@pytest.mark.parametrize("size", [1000, len(NOISE)])
def test_a_lost_answer_to_a_commit_is_a_commit(server: SeaweedFS, size: int) -> None:
    with Proxy(
        server.endpoint, once("lose", "POST" if size > PART else "PUT", "uploadId" if size > PART else "")
    ) as proxy:
        storage = through(proxy, server)
        if size > PART:
            assert put(storage, "data", NOISE.data) == size
        else:
            writer = storage.create("data")
            writer.write(NOISE.data[:size])
            assert writer.commit() == size
        assert proxy.seen["lose"] == 1
        assert storage.read("data") == NOISE.data[:size]
        assert [*storage.unfinished("")] == []


@pytest.mark.parametrize("size", [1000, len(NOISE)])
def test_a_lost_answer_to_a_commit_is_a_commit_where_a_store_keeps_no_metadata(tmp_path: Path, size: int) -> None:
    with JuiceFS(tmp_path) as server, Proxy(server.endpoint, lambda method, path: "pass") as proxy:
        server.make_bucket("ckpt")
        storage = through(proxy, server)
        writer = storage.create("data")
        writer.write(NOISE.data[:size])
        # The gateway ignores the condition of a PUT, and knows an upload no more once it was completed.
        proxy.fate = once("lose", "POST" if size > PART else "PUT", "uploadId=" if size > PART else "")
        assert writer.commit() == size
        assert proxy.seen["lose"] == 1
        assert storage.read("data") == NOISE.data[:size]


def test_another_ones_object_is_not_taken_for_ours_after_a_lost_answer(server: SeaweedFS) -> None:
    """It comes between our look and our put, whose first try is lost on the way."""
    with Proxy(server.endpoint, lambda method, path: "pass") as proxy:
        storage, plain = through(proxy, server), server.client()
        path = f"{storage.url.removeprefix('s3://ckpt/')}/data"
        writer = storage.create("data")
        writer.write(b"ours")

        def come_between(method: str, path_and_query: str) -> Fate:
            if method == "PUT" and not proxy.seen["drop"]:
                plain.put_object(Bucket="ckpt", Key=path, Body=b"them")
                return "drop"
            return "pass"

        proxy.fate = come_between
        with pytest.raises(StorageError, match="PreconditionFailed"):
            writer.commit()
        assert storage.read("data") == b"them"


def test_patience_ends_with_what_the_server_said_and_how_often(server: SeaweedFS) -> None:
    with Proxy(server.endpoint, lambda method, path: "slow down") as proxy:
        storage = through(proxy, server, patience_s=1.0)
        with pytest.raises(TransientStorageError, match=r"SlowDown: Please reduce.*tried \d+ times in"):
            storage.read("data")
        assert proxy.seen["slow down"] > 2


def test_a_failed_part_ends_the_others_and_leaves_no_upload(server: SeaweedFS) -> None:
    fate = lambda method, path: "slow down" if "partNumber=3" in path else "pass"  # noqa: E731
    with Proxy(server.endpoint, fate) as proxy:
        storage = through(proxy, server, patience_s=1.0)
        with pytest.raises(StorageError, match="SlowDown"):
            put(storage, "data", NOISE.data)
        assert [*storage.unfinished("")] == [*storage.list("")] == []


def test_credentials_that_expire_are_looked_for_once_more(
    server: SeaweedFS, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As when a file of ~/.aws is renewed by somebody else while the job runs."""
    file = tmp_path / "credentials"
    file.write_text("[default]\naws_access_key_id=old\naws_secret_access_key=oldsecret\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    with Proxy(server.endpoint, once("expired", "PUT")) as proxy:
        storage = S3Storage(root(), {"endpoint_url": proxy.endpoint, "region_name": "us-east-1"})
        file.write_text(
            f"[default]\naws_access_key_id={server.options['key']}\naws_secret_access_key={server.options['secret']}\n"
        )
        assert storage.put_if_absent("a", b"x")
        proxy.fate = lambda method, path: "expired"
        with pytest.raises(StorageError, match="log in again"):
            storage.read("a")


def test_what_a_killed_writer_left_is_listed_and_can_be_given_up(server: SeaweedFS) -> None:
    storage = S3Storage(root(), server.options)
    writer = storage.create("steps/1/1/data-0.bin")
    assert isinstance(writer, PartWriter)
    writer.put_part(0, [NOISE.data[:PART]])
    (found,) = storage.unfinished("steps/")
    assert found.key == "steps/1/1/data-0.bin"
    assert abs(found.began - time.time()) < 600
    assert [*storage.unfinished("records/")] == [*storage.list("")] == []
    assert storage.abort_unfinished("steps/", older_than_s=3600) == 0
    assert storage.abort_unfinished("steps/", older_than_s=-600) == 1
    assert storage.abort_unfinished("steps/", older_than_s=-600) == 0
    assert [*storage.unfinished("")] == []
    with pytest.raises(StorageError):
        writer.commit()


def test_a_wrong_key_is_an_error_at_once_that_says_what_to_do(server: SeaweedFS) -> None:
    for wrong in ({"key": "nokey"}, {"secret": "wrong-secret"}, {"key": "nobody", "secret": "nobodysecret"}):
        storage = S3Storage(root(), server.options | wrong)
        began = time.monotonic()
        for call in (
            lambda storage=storage: storage.put_if_absent("a", b"x"),
            lambda storage=storage: storage.create("a"),
            lambda storage=storage: storage.read("a"),
            lambda storage=storage: list(storage.list("")),
            lambda storage=storage: storage.delete("a"),
        ):
            with pytest.raises(StorageError, match="check the credentials") as caught:
                call()
            assert not isinstance(caught.value, TransientStorageError)
            assert "wrong-secret" not in str(caught.value)
        assert time.monotonic() - began < 10


def test_a_bucket_that_may_only_be_read_refuses_puts_and_nothing_else(server: SeaweedFS) -> None:
    place = root()
    S3Storage(place, server.options).put_if_absent("a", b"x")
    reader = S3Storage(place, server.options | {"key": "reader", "secret": "readersecret"})
    assert reader.read("a") == b"x"
    assert len([*reader.list("")]) == 1
    with pytest.raises(StorageError, match="AccessDenied"):
        reader.put_if_absent("b", b"x")
    with pytest.raises(CheckpointNotFoundError):
        reader.read("b")


@pytest.mark.heavy
def test_a_full_server_is_an_error_that_says_so_and_leaves_no_upload(tmp_path: Path) -> None:
    with JuiceFS(tmp_path, capacity_gib=1) as server:
        server.make_bucket("ckpt")
        storage = S3Storage(root(), server.options | {"part_bytes": PART, "patience_s": 5.0})
        data = np.resize(NOISE, 220 * PART)
        with pytest.raises(StorageError, match="free some there"):
            put(storage, "data", data.data)
        assert [*storage.unfinished("")] == [*storage.list("")] == []
        assert storage.put_if_absent("small", b"x")


def test_a_missing_bucket_is_named(server: SeaweedFS) -> None:
    storage = S3Storage("no-such-bucket/run", server.options)
    with pytest.raises(StorageError, match=r"NoSuchBucket.*create the bucket"):
        list(storage.list(""))


@pytest.mark.parametrize(
    "away_s", [1.0, pytest.param(5.0, marks=pytest.mark.heavy), pytest.param(30.0, marks=pytest.mark.heavy)]
)
def test_a_server_that_dies_in_an_upload_and_comes_back_gets_only_what_was_lost(tmp_path: Path, away_s: float) -> None:
    with SeaweedFS(tmp_path / "weed") as server, Proxy(server.endpoint, lambda method, path: "pass") as proxy:
        server.make_bucket("ckpt")
        storage = through(proxy, server, patience_s=120)
        data = np.resize(NOISE, 24 * PART)
        with ThreadPoolExecutor(1) as pool:
            size = pool.submit(put, storage, "data", data.data)
            while proxy.sent_bytes < 8 * PART and not size.done():
                time.sleep(0.001)
            server.kill()
            assert not size.done()
            time.sleep(away_s)
            server.start()
            assert size.result() == len(data)
        assert storage.read("data") == data.data
        # At most the four that were under way: the server had them, and their answers were lost.
        again = proxy.arrived_bytes - len(data)
        assert 0 <= again <= 4 * PART


@pytest.mark.parametrize(
    "given", [{"nonsense": 1}, {"part_bytes": 1 << 20}, {"requests_in_flight": 0}, {"patience_s": "long"}]
)
def test_options_that_cannot_be_meant_are_refused_by_name(given: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(given))):
        S3Storage("ckpt/run", {"secret": "hidden-secret", **given})


def test_a_store_without_conditions_is_found(tmp_path: Path) -> None:
    """The claim is also the probe (docs/commit.md P4)."""
    from dscheck.commit.term import claim

    with JuiceFS(tmp_path) as server:
        server.make_bucket("ckpt")
        storage = S3Storage(root(), server.options)
        with pytest.raises(StorageError, match="does not honour put-if-absent"):
            claim(storage, seen=0, parent=None, run=None, host="here", now=0.0)
