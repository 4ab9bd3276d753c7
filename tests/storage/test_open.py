"""What `open_storage` makes of a root, and that it makes nothing on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from dscheck.errors import CheckpointNotFoundError, ConfigError
from dscheck.storage import LocalStorage, MemoryStorage, Storage, open_storage


def test_a_path_and_a_file_url_open_the_same_directory(tmp_path: Path) -> None:
    for root in (
        tmp_path / "a b",
        str(tmp_path / "a b"),
        f"file://{tmp_path}/a%20b",
        f"FILE://localhost{tmp_path}/a b",
    ):
        storage = open_storage(root)
        assert isinstance(storage, LocalStorage)
        assert storage.url == str(tmp_path / "a b")


def test_a_relative_path_keeps_its_meaning_after_chdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = open_storage("run")
    monkeypatch.chdir("/")
    assert storage.put_if_absent("a", b"x")
    assert (tmp_path / "run" / "a").read_bytes() == b"x"


def test_one_memory_name_is_one_store() -> None:
    assert open_storage("memory://one-name").put_if_absent("a", b"x")
    assert not open_storage("memory://one-name/").put_if_absent("a", b"y")
    assert open_storage("memory://another-name").put_if_absent("a", b"y")
    assert open_storage("memory://one-name").url == "memory://one-name"


def test_a_storage_is_returned_as_it_is() -> None:
    storage = MemoryStorage()
    assert isinstance(storage, Storage)
    assert open_storage(storage) is storage


def test_opening_and_reading_a_missing_root_creates_nothing(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "run" / "7")
    assert list(storage.list("")) == []
    assert list(storage.list("records/")) == []
    storage.delete("records/1-1.json")
    with pytest.raises(CheckpointNotFoundError, match=r"run/7/records/1-1\.json"):
        storage.read("records/1-1.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "root", ["", "a\0b", "memory://", "file://host/a", "file://a", "s3://key:secret@bucket/a", 7, b"a"]
)
def test_a_root_that_names_nothing_is_one_config_error(root: object) -> None:
    with pytest.raises(ConfigError) as caught:
        open_storage(root)  # type: ignore[arg-type]
    assert "secret" not in str(caught.value)


def test_a_root_that_is_a_file_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "dangling"):
        with pytest.raises(ConfigError, match="is not a directory"):
            open_storage(tmp_path / name)
