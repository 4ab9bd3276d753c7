"""S3Storage against real servers: the facts of every storage, and what is S3's own."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from dscheck.storage.s3 import S3Storage
from dscheck.testing.conformance import Raw, StorageConformance
from dscheck.testing.servers import S3Server, SeaweedFS


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with SeaweedFS(tmp_path_factory.mktemp("weed")) as server:
        server.make_bucket("ckpt")
        yield server


@pytest.fixture
def storage(server: S3Server) -> S3Storage:
    """A root of its own for each test."""
    return S3Storage(f"ckpt/{uuid.uuid4().hex}", server.options)


class TestS3Storage(StorageConformance):
    race_rounds = 3  # weed lets losers of a race wait for seconds, one after the other

    @pytest.fixture
    def storage(self, server: S3Server) -> Iterator[S3Storage]:
        storage = S3Storage(f"ckpt/{uuid.uuid4().hex}", server.options)
        yield storage
        assert [*storage.unfinished("")] == []

    @pytest.fixture
    def raw(self, server: S3Server, storage: S3Storage) -> Raw:
        client: Any = server.client()
        prefix = storage.url.removeprefix("s3://ckpt/")

        def read(key: str) -> bytes | None:
            try:
                return bytes(client.get_object(Bucket="ckpt", Key=f"{prefix}/{key}")["Body"].read())
            except client.exceptions.NoSuchKey:
                return None

        return read


def test_a_store_with_the_condition_is_found_to_have_it(storage: S3Storage) -> None:
    assert storage.lacks_condition() is None
    assert [*storage.list("")] == []
