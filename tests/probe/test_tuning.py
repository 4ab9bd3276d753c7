"""Stored settings are defaults of later jobs, and damage in them never stops one."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dscheck import Checkpointer
from dscheck.manifest.text import seal
from dscheck.storage import LocalStorage, MemoryStorage
from dscheck.testing import Faulty
from dscheck.tuning import NAME, Tuning, store, tuned

RATES = {"save_bytes_s": 2e9, "load_bytes_s": 1.5e9}


def body(**settings: Any) -> dict[str, Any]:
    return {"version": 1, "requires": [], "kind": "tuning", "settings": settings, "time": 1.5} | RATES


def test_stored_settings_and_rates_come_back_and_are_replaced_by_later_ones(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    assert tuned(storage) is None
    before = time.time()
    assert store(storage, {"io_threads": 2, "direct_io": False}, 2e9, 1.5e9) == str(tmp_path / NAME)
    found = tuned(storage)
    assert found is not None
    assert before <= found.time <= time.time()
    assert replace(found, time=0.0) == Tuning({"io_threads": 2, "direct_io": False}, 2e9, 1.5e9, 0.0)
    store(storage, {}, 3e9, 1.0)
    found = tuned(storage)
    assert found is not None
    assert replace(found, time=0.0) == Tuning({}, 3e9, 1.0, 0.0)
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_only_what_the_user_left_open_is_taken_from_them(tmp_path: Path) -> None:
    store(LocalStorage(tmp_path), {"io_threads": 2, "read_threads": 3}, 2e9, 1.5e9)
    with Checkpointer(tmp_path, {"x": torch.ones(3)}, read_threads=5) as ckpt:
        assert (ckpt.settings.io_threads, ckpt.settings.read_threads) == (2, 5)
        ckpt.save(1).wait()
        assert ckpt.load() == 1


def test_what_is_not_tunable_or_not_known_is_left_out(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(seal(body(io_threads=2, timeout_s=1.0, trace="x", of_a_later_version=7)))
    assert tuned(LocalStorage(tmp_path)) == Tuning({"io_threads": 2}, 2e9, 1.5e9, 1.5)


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
        seal(body() | {"load_bytes_s": 0}),
        seal(body() | {"save_bytes_s": -1.0}),
        seal(body() | {"load_bytes_s": "fast"}),
        seal({name: value for name, value in body().items() if name != "load_bytes_s"}),
        seal(body() | {"version": 2}),
        seal(body() | {"kind": "record"}),
    ],
)
def test_damaged_settings_are_a_warning(tmp_path: Path, data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / NAME).write_bytes(data)
    with caplog.at_level(logging.WARNING, "dscheck"):
        assert tuned(LocalStorage(tmp_path)) is None
    assert "dscheck probe" in caplog.text


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/etc/hostname", path)])
def test_what_is_no_file_in_their_place_neither_hangs_nor_stops_a_job(tmp_path: Path, make: Any) -> None:
    make(tmp_path / NAME)
    with Checkpointer(tmp_path, {"x": torch.ones(3)}) as ckpt:
        assert ckpt.settings.io_threads == 4


def test_only_a_directory_is_asked_for_them(tmp_path: Path) -> None:
    store(LocalStorage(tmp_path), {"io_threads": 2}, 2e9, 1.5e9)
    assert tuned(MemoryStorage("tuning")) is None
    assert tuned(Faulty(LocalStorage(tmp_path))) is None
