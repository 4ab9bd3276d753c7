"""The storages that ship with dscheck satisfy the facts that plug-ins must."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dscheck.storage import LocalStorage, MemoryStorage, Storage
from dscheck.testing import Faulty, PowerCut
from dscheck.testing.conformance import Raw, StorageConformance


class TestMemoryStorage(StorageConformance):
    @pytest.fixture
    def storage(self) -> MemoryStorage:
        return MemoryStorage()

    @pytest.fixture
    def raw(self, storage: MemoryStorage) -> Raw:
        objects = storage._store.objects
        return lambda key: bytes(objects[key]) if key in objects else None


class TestLocalStorage(StorageConformance):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Iterator[LocalStorage]:
        yield LocalStorage(tmp_path / "runs" / "7")
        left = [path for path in tmp_path.rglob("*") if path.name.startswith(".")]
        assert left == [], "temporary files"

    @pytest.fixture
    def raw(self, tmp_path: Path) -> Raw:
        def read(key: str) -> bytes | None:
            path = tmp_path / "runs" / "7" / key
            return path.read_bytes() if path.exists() else None

        return read


class TestWrappedStorage(TestMemoryStorage):
    """Wrappers without a fault change nothing."""

    @pytest.fixture
    def inner(self) -> MemoryStorage:
        return MemoryStorage()

    @pytest.fixture
    def storage(self, inner: MemoryStorage) -> Storage:
        return Faulty(PowerCut(inner), lambda operation, proceed: proceed(operation))

    @pytest.fixture
    def raw(self, inner: MemoryStorage) -> Raw:
        objects = inner._store.objects
        return lambda key: bytes(objects[key]) if key in objects else None
