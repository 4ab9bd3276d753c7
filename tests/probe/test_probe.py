"""The self-test of a root disturbs nothing, leaves nothing but its settings, and says why it cannot."""

from __future__ import annotations

import errno
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from dscheck import Checkpointer
from dscheck.errors import ConfigError, StorageError
from dscheck.probe import Findings, Rate, Reached, Way, disk, probe, run
from dscheck.storage import LocalStorage
from dscheck.tuning import NAME, tuned

MB = 10**6


def test_a_probe_measures_both_kinds_of_io_and_dscheck_and_leaves_only_its_settings(tmp_path: Path) -> None:
    found = probe(str(tmp_path / "new" / "root"), 2 * MB, 0.0)
    assert {way.direct for way in found.ways} == {True, False}
    assert found.reached[0].settings == {}
    assert all(one.save > 0 and one.load > 0 for one in found.reached)
    stored = tuned(LocalStorage(tmp_path / "new" / "root"))
    assert stored is not None
    assert Reached(stored.settings, stored.save_bytes_s, stored.load_bytes_s) in found.reached
    assert [path.name for path in (tmp_path / "new" / "root").iterdir()] == [NAME]


def test_a_root_with_checkpoints_goes_on_as_before(tmp_path: Path) -> None:
    state = {"x": torch.arange(10_000)}
    with Checkpointer(tmp_path, state) as ckpt:
        ckpt.save(1).wait()
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert probe(str(tmp_path), MB, 0.0, keep=False).stored is None
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        ckpt.save(2).wait()
        assert ckpt.steps() == [1, 2]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "no space left")])
def test_an_interrupted_probe_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def interrupted(*_: Any) -> None:
        raise error

    monkeypatch.setattr(run, "save_and_load", interrupted)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else StorageError):
        probe(str(tmp_path), MB, 0.0)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10 * MB, 8 * MB, 2 * MB))
    with pytest.raises(StorageError, match="2 MB free and a probe needs 3"):
        probe(str(tmp_path), MB, 0.0)
    assert list(tmp_path.iterdir()) == []


def test_a_storage_that_is_no_file_system_is_refused() -> None:
    with pytest.raises(ConfigError, match="measures file systems"):
        probe("memory://probe", MB, 0.0)


def test_a_file_system_that_refuses_direct_io_is_measured_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = disk.write_file

    def refusing(path: str, nbytes: int, way: Way) -> None:
        if way.direct:
            raise OSError(errno.EINVAL, "refused")
        plain(path, nbytes, way)

    monkeypatch.setattr(run, "write_file", refusing)
    found = probe(str(tmp_path), MB, 0.0)
    assert all(rate.write is None for way, rate in found.ways.items() if way.direct)
    assert found.reached[1].settings["direct_io"] is False


def test_what_saves_and_loads_fastest_together_is_chosen() -> None:
    reached = [Reached({}, 1.0, 3.0), Reached({"io_threads": 1}, 2.0, 2.0), Reached({"io_threads": 2}, 3.0, 1.0)]
    assert Findings(MB, reached=reached).chosen is reached[1]


def test_fewer_threads_are_suggested_where_they_are_as_fast() -> None:
    found = Findings(MB)
    found.ways = {
        Way(True, 1 << 20, 1): Rate(98.0, 50.0),
        Way(False, 1 << 20, 1): Rate(99.0, 50.0),
        Way(True, 1 << 20, 8): Rate(100.0, 100.0),
    }
    assert run._suggested(found) == {"io_threads": 1, "read_threads": 8}
