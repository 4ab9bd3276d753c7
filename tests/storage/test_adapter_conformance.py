"""Every kind of file system that fsspec brings satisfies the facts of a storage, as far as it has a condition."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dscheck.commit import SingleWriter
from dscheck.storage import Storage, open_storage
from dscheck.testing.conformance import Raw, StorageConformance
from tests.storage.file_systems import Cloud, Vault


class TestObjectStore(StorageConformance):
    @pytest.fixture
    def storage(self) -> Iterator[Storage]:
        yield open_storage("cloud://bucket/runs/7")
        left = [name for name in Cloud.objects if "/." in name]
        Cloud.objects.clear()
        assert left == [], "temporary objects"

    @pytest.fixture
    def other(self) -> Storage:
        return open_storage("cloud://bucket/runs/7/")

    @pytest.fixture
    def raw(self) -> Raw:
        return lambda key: Cloud.objects.get(f"bucket/runs/7/{key}")


class TestMemoryOfFsspec(StorageConformance):
    conditional = False

    @pytest.fixture
    def storage(self) -> Iterator[Storage]:
        yield SingleWriter(open_storage("vault://runs/7"))
        left = [name for name in Vault.store if "/." in name]
        Vault.store.clear()
        assert left == [], "temporary objects"

    @pytest.fixture
    def other(self) -> Storage:
        return SingleWriter(open_storage("vault://runs/7"))

    @pytest.fixture
    def raw(self) -> Raw:
        return lambda key: Vault.store[f"/runs/7/{key}"].getvalue() if f"/runs/7/{key}" in Vault.store else None


class TestFilesThatARenameDoesNotReplace(StorageConformance):
    scheme = "shelf"

    def open(self, folder: Path) -> Storage:
        return open_storage(f"{self.scheme}://{folder}/runs/7")

    @pytest.fixture
    def storage(self, tmp_path: Path) -> Iterator[Storage]:
        yield self.open(tmp_path)
        left = [path for path in tmp_path.rglob("*") if path.name.startswith(".")]
        assert left == [], "temporary files"

    @pytest.fixture
    def other(self, tmp_path: Path) -> Storage:
        return self.open(tmp_path)

    @pytest.fixture
    def raw(self, tmp_path: Path) -> Raw:
        def read(key: str) -> bytes | None:
            path = tmp_path / "runs" / "7" / key
            return path.read_bytes() if path.exists() else None

        return read


class TestFilesThatARenameReplaces(TestFilesThatARenameDoesNotReplace):
    scheme = "attic"
    conditional = False

    def open(self, folder: Path) -> Storage:
        return SingleWriter(super().open(folder))
