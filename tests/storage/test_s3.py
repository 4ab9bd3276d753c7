"""S3Storage against real servers: the facts of every storage, and what is S3's own."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from dscheck.commit import SingleWriter
from dscheck.storage.s3 import S3Storage
from dscheck.testing.conformance import Raw, StorageConformance
from dscheck.testing.servers import JuiceFS, S3Server, SeaweedFS
from tests.storage.ceph import Ceph


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with SeaweedFS(tmp_path_factory.mktemp("weed")) as server:
        server.make_bucket("ckpt")
        yield server


@pytest.fixture
def storage(server: S3Server) -> S3Storage:
    """A root of its own for each test."""
    return S3Storage(f"ckpt/{uuid.uuid4().hex}", server.options)


def reader(server: S3Server, storage: S3Storage) -> Raw:
    """What lies in the bucket, by another client."""
    client: Any = server.client()
    prefix = storage.url.removeprefix("s3://ckpt/")

    def read(key: str) -> bytes | None:
        try:
            return bytes(client.get_object(Bucket="ckpt", Key=f"{prefix}/{key}")["Body"].read())
        except client.exceptions.NoSuchKey:
            return None

    return read


class TestS3Storage(StorageConformance):
    race_rounds = 3  # weed lets losers of a race wait for seconds, one after the other

    @pytest.fixture
    def storage(self, server: S3Server) -> Iterator[S3Storage]:
        storage = S3Storage(f"ckpt/{uuid.uuid4().hex}", server.options)
        yield storage
        assert [*storage.unfinished("")] == []

    @pytest.fixture
    def other(self, server: S3Server, storage: S3Storage) -> S3Storage:
        return S3Storage(storage.url.removeprefix("s3://"), server.options)

    @pytest.fixture
    def raw(self, server: S3Server, storage: S3Storage) -> Raw:
        return reader(server, storage)


@pytest.mark.heavy
class TestS3StorageOnCeph(TestS3Storage):
    race_rounds = 40

    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
        with Ceph(tmp_path_factory.mktemp("ceph")) as server:
            server.make_bucket("ckpt")
            yield server


class TestS3StorageWithoutCondition(TestS3Storage):
    """As commit="single-writer" has it."""

    conditional = False

    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
        with JuiceFS(tmp_path_factory.mktemp("juicefs")) as server:
            server.make_bucket("ckpt")
            yield server

    @pytest.fixture
    def below(self, server: S3Server) -> S3Storage:
        return S3Storage(f"ckpt/{uuid.uuid4().hex}", server.options)

    @pytest.fixture
    def storage(self, below: S3Storage) -> Iterator[SingleWriter]:
        yield SingleWriter(below)
        assert [*below.unfinished("")] == []

    @pytest.fixture
    def other(self, server: S3Server, below: S3Storage) -> SingleWriter:
        return SingleWriter(S3Storage(below.url.removeprefix("s3://"), server.options))

    @pytest.fixture
    def raw(self, server: S3Server, below: S3Storage) -> Raw:
        return reader(server, below)


def test_a_store_with_the_condition_is_found_to_have_it(storage: S3Storage) -> None:
    assert storage.lacks_condition() is None
    assert [*storage.list("")] == []
