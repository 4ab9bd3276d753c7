"""What `open_storage` makes of a root, and that it makes nothing on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from dscheck.errors import CheckpointNotFoundError, ConfigError
from dscheck.storage import LocalStorage, MemoryStorage, Storage, open_storage
from tests.storage.file_systems import Strict


def test_a_path_and_a_file_url_open_the_same_directory(tmp_path: Path) -> None:
    for root in (
        tmp_path / "a b",
        str(tmp_path / "a b"),
        f"file://{tmp_path}/a%20b",
        f"FILE://localhost{tmp_path}/a b",
        f"local://{tmp_path}/a%20b",
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
    "root",
    [
        "",
        "a\0b",
        "memory://",
        "file://host/a",
        "file://a",
        "file://me:secret@host/a",
        "nobody://key:secret@bucket/a",
        "cloud://key:secret@bucket/a",
        "cloud://",
        "simplecache::cloud://key:secret@bucket/a",
        "absent://me:secret@host/a",
        7,
        b"a",
    ],
)
def test_a_root_that_names_nothing_is_one_config_error(root: object) -> None:
    with pytest.raises(ConfigError) as caught:
        open_storage(root)  # type: ignore[arg-type]
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("root", "expected"),
    [
        ("nobody://host/a", "fsspec does not know it either"),
        ("absent://host/a", r"'absent://': Please install absent-fs to reach it \(with pip\)"),
        ("zip::cloud://bucket/a", "a chain of file systems"),
        ("cloud://key:secret@bucket/a", "reads no credentials from a URL"),
    ],
)
def test_what_nothing_serves_says_what_is_missing(root: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        open_storage(root)


@pytest.mark.parametrize("root", ["/a", "file:///a", "memory://a", MemoryStorage()])
def test_what_takes_no_options_names_those_it_was_given(root: object) -> None:
    with pytest.raises(ConfigError, match="takes no storage_options: key, anon") as caught:
        open_storage(root, {"key": "secret", "anon": True})  # type: ignore[arg-type]
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("options", ["anon", [("key", "secret")], {1: "secret"}])
def test_options_are_a_mapping(options: object) -> None:
    with pytest.raises(ConfigError, match="expected a mapping with texts as keys") as caught:
        open_storage("cloud://bucket/a", options)  # type: ignore[arg-type]
    assert "secret" not in str(caught.value)


def test_an_option_that_the_file_system_does_not_take_is_named() -> None:
    with pytest.raises(ConfigError, match="its options were bucket, token") as caught:
        open_storage(f"{Strict.protocol}://bucket/a", {"bucket": "b", "token": "planted"})
    assert "planted" not in str(caught.value)


def test_a_root_that_is_a_file_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "dangling"):
        with pytest.raises(ConfigError, match="is not a directory"):
            open_storage(tmp_path / name)
