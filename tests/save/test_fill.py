"""Data files that native threads fill: the same bytes as through a storage that only streams, and errors that tell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dscheck import Checkpointer, StorageError
from dscheck.storage.base import FileWriter
from dscheck.storage.local import LocalStorage
from dscheck.testing import Faulty

KIB, MIB = 1 << 10, 1 << 20
EDGES = [0, 1, 63, 16 * KIB, 16 * KIB + 4, 256 * KIB, MIB - 4, MIB, MIB + 4, MIB + 4 * KIB, 3 * MIB + 4 * KIB + 12]


def tensors(sizes: list[int], permuted: bool) -> dict[str, torch.Tensor]:
    made = {f"t{i:02}": torch.randint(0, 256, (size,), dtype=torch.uint8) for i, size in enumerate(sizes)}
    if permuted:
        made["t00p"] = torch.randn(700, 500).t()
        made["z"] = torch.randn(3, 5).t()
    return made


def files(root: Path) -> dict[str, bytes]:
    """The data files of step 1."""
    return {path.name: path.read_bytes() for path in (root / "steps" / "1").rglob("*.bin")}


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.sampled_from(EDGES), max_size=8),
    permuted=st.booleans(),
    direct=st.booleans(),
    piece_bytes=st.sampled_from([256 * KIB, MIB, 32 * MIB]),
    budget=st.sampled_from(["auto", 2 * MIB]),
)
def test_the_file_is_the_one_that_a_stream_gives(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    permuted: bool,
    direct: bool,
    piece_bytes: int,
    budget: Any,
) -> None:
    state, roots = tensors(sizes, permuted), [tmp_path_factory.mktemp(name) for name in ("filled", "streamed")]
    for root, storage in zip(roots, (str(roots[0]), Faulty(LocalStorage(str(roots[1])))), strict=True):
        with Checkpointer(
            storage,  # type: ignore[arg-type]
            state,
            rng=False,
            direct_io=direct,
            piece_bytes=piece_bytes,
            host_memory_bytes=budget,
            io_bytes_in_flight=MIB,
        ) as ckpt:
            ckpt.save(1).wait()
        assert files(root)
    assert files(roots[0]) == files(roots[1])
    loaded = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    with Checkpointer(roots[0], loaded, rng=False) as ckpt:
        assert ckpt.load() == 1
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_only_a_writer_that_is_a_file_is_filled(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    filled, streamed = storage.create("a.bin"), Faulty(storage).create("b.bin")
    assert isinstance(filled, FileWriter)
    assert not isinstance(streamed, FileWriter)
    filled.abort()
    streamed.abort()


def test_reserved_bytes_come_first_and_writes_behind_them(tmp_path: Path) -> None:
    writer = LocalStorage(str(tmp_path)).create("a.bin")
    assert isinstance(writer, FileWriter)
    with writer.reserved(5) as file:
        os.pwrite(file, b"world", 0)
    writer.write(b"!")
    assert writer.commit() == 6
    assert (tmp_path / "a.bin").read_bytes() == b"world!"


def test_an_error_inside_is_told_with_the_file_and_is_final(tmp_path: Path) -> None:
    writer = LocalStorage(str(tmp_path)).create("a.bin")
    assert isinstance(writer, FileWriter)
    told = r"cannot write to .*a\.bin.*No space left.*free some space"
    with pytest.raises(StorageError, match=told), writer.reserved(5):
        raise OSError(28, os.strerror(28))
    with pytest.raises(StorageError, match="failed before"):
        writer.commit()
    writer.abort()
    assert list(tmp_path.iterdir()) == []


@contextmanager
def opened() -> Iterator[set[str]]:
    """The files that have been opened in it and are open at its end."""
    found: set[str] = set()
    before = set(os.listdir("/proc/self/fd"))
    yield found
    for number in set(os.listdir("/proc/self/fd")) - before:
        try:
            found.add(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:
            continue


def test_a_save_that_has_ended_holds_no_file_open(tmp_path: Path) -> None:
    """Closed at the next save, a file that was deleted meanwhile would take that call the time of all its bytes."""
    with Checkpointer(tmp_path, {"x": torch.zeros(MIB)}) as ckpt:
        with opened() as found:
            ckpt.save(1).wait()
        assert [path for path in found if ".bin" in path] == []


def test_a_trace_shows_the_writes(tmp_path: Path) -> None:
    state = {f"x{i}": torch.zeros(MIB) for i in range(3)}
    with Checkpointer(tmp_path / "root", state, trace=str(tmp_path / "traces")) as ckpt:
        ckpt.save(1).wait()
    events = json.loads((tmp_path / "traces" / "trace-1-rank0.json").read_text())["traceEvents"]
    tracks = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    writes = [e for e in events if e["ph"] == "X" and tracks[e["tid"]].startswith("write ")]
    assert sum(e["args"]["bytes"] for e in writes) == 3 * 4 * MIB
    by_track: dict[int, list[tuple[float, float]]] = {}
    for e in writes:
        by_track.setdefault(e["tid"], []).append((e["ts"], e["ts"] + e["dur"]))
    for spans in by_track.values():  # viewers take spans of one track for nested when they overlap
        assert all(one[1] <= other[0] for one, other in zip(sorted(spans), sorted(spans)[1:], strict=False))


@pytest.mark.parametrize("direct", [True, False])
def test_a_full_disk_fails_the_save_and_not_the_next_one(tmp_path: Path, direct: bool) -> None:
    """A limit on the length of files stands in for it: whichever call meets it first, room or bytes."""
    script = f"""
        import resource, signal, sys, warnings, torch
        from dscheck import Checkpointer, StorageError
        warnings.simplefilter("ignore")
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        state = {{"a": torch.arange(3 << 20), "b": torch.arange(1000)}}
        with Checkpointer(sys.argv[1], state, direct_io={direct}) as ckpt:
            ckpt.save(1).wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (5 << 20, resource.RLIM_INFINITY))
            try:
                ckpt.save(2).wait()
            except StorageError as error:
                print(error)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            ckpt.save(3).wait()
            print(ckpt.steps())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    message, steps = done.stdout.splitlines()
    assert message.startswith("cannot write to '")
    assert "data-0.bin': File too large" in message
    assert steps == "[1, 3]"
    assert not list((tmp_path / "steps" / "2").rglob("*.bin"))
