"""Stored settings are defaults of later jobs, and damage in them never stops one."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dscheck import Checkpointer
from dscheck.manifest.text import seal
from dscheck.storage import LocalStorage, MemoryStorage
from dscheck.testing import Faulty
from dscheck.tuning import NAME, store, tuned


def body(**settings: Any) -> dict[str, Any]:
    return {"version": 1, "requires": [], "kind": "tuning", "settings": settings}


def test_stored_settings_come_back_and_are_replaced_by_later_ones(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    assert tuned(storage) == {}
    assert store(storage, {"io_threads": 2, "direct_io": False}) == str(tmp_path / NAME)
    assert tuned(storage) == {"io_threads": 2, "direct_io": False}
    store(storage, {})
    assert tuned(storage) == {}
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_only_what_the_user_left_open_is_taken_from_them(tmp_path: Path) -> None:
    store(LocalStorage(tmp_path), {"io_threads": 2, "read_threads": 3})
    with Checkpointer(tmp_path, {"x": torch.ones(3)}, read_threads=5) as ckpt:
        assert (ckpt.settings.io_threads, ckpt.settings.read_threads) == (2, 5)
        ckpt.save(1).wait()
        assert ckpt.load() == 1


def test_what_is_not_tunable_or_not_known_is_left_out(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(seal(body(io_threads=2, timeout_s=1.0, trace="x", of_a_later_version=7)))
    assert tuned(LocalStorage(tmp_path)) == {"io_threads": 2}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        bytes(100_000),
        seal(body(io_threads=2))[:-1],
        seal(body(io_threads=2)).replace(b"2", b"3", 1),
        seal(body(io_threads=0)),
        seal(body(io_threads=65)),
        seal(body(io_threads=True)),
        seal(body(direct_io="yes")),
        seal(body() | {"settings": [1]}),
        seal(body() | {"version": 2}),
        seal(body() | {"kind": "record"}),
    ],
)
def test_damaged_settings_are_a_warning(tmp_path: Path, data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / NAME).write_bytes(data)
    with caplog.at_level(logging.WARNING, "dscheck"):
        assert tuned(LocalStorage(tmp_path)) == {}
    assert "dscheck probe" in caplog.text


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/etc/hostname", path)])
def test_what_is_no_file_in_their_place_neither_hangs_nor_stops_a_job(tmp_path: Path, make: Any) -> None:
    make(tmp_path / NAME)
    with Checkpointer(tmp_path, {"x": torch.ones(3)}) as ckpt:
        assert ckpt.settings.io_threads == 4


def test_only_a_directory_is_asked_for_them(tmp_path: Path) -> None:
    store(LocalStorage(tmp_path), {"io_threads": 2})
    assert tuned(MemoryStorage("tuning")) == {}
    assert tuned(Faulty(LocalStorage(tmp_path))) == {}
