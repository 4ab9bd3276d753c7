"""The benchmark of the native loops, at sizes that take seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import kernels
from benchmarks.launch import REPOSITORY


def test_the_slow_twin_has_the_standard_s_check_value() -> None:
    assert kernels.slow_crc32c(b"123456789") == 0xE3069283


def test_a_box_that_brings_other_bytes_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = kernels.place

    def wrong(data: Any, block_bytes: int, blocks: Any, copies: Any) -> Any:
        data[0] ^= 1
        found = plain(data, block_bytes, blocks, copies)
        data[0] ^= 1
        return found

    monkeypatch.setattr(kernels, "place", wrong)
    with pytest.raises(kernels.WrongBytesError, match="gather of rows of 16 bytes"):
        list(kernels.boxes(1 << 17, 1))


def test_a_checksum_that_differs_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "crc32c_blocks", lambda data, block: np.zeros(-(-data.nbytes // block), np.uint32))
    with pytest.raises(kernels.WrongBytesError, match="crc32c_blocks of 4096 bytes"):
        list(kernels.checksums(1 << 20, 1))


def test_targets_are_of_the_slowest_that_count() -> None:
    crcs = [
        {"block_bytes": block, "from": where, "bytes_s": rate}
        for block, rate in ((4096, 1e9), (1 << 16, 11e9), (1 << 20, 12e9))
        for where in ("memory", "cache")
    ]
    scatters = [{"row_bytes": row, "of_memcpy": part} for row, part in ((16, 0.1), (64, 0.6), (256, 0.9))]
    found = list(kernels.targets(crcs, scatters))
    assert [(target.measured, target.verdict) for target in found] == [
        ("11 GB/s", "reached"),
        ("11 GB/s", "reached"),
        ("0.6", "missed"),
    ]


def test_kernels_writes_its_page(tmp_path: Path) -> None:
    options = ["--mb", "4", "--rounds", "1", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.kernels", *options]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "kernels.json").read_text())["boxes"]) == 2 * len(kernels.ROWS)
    assert "| gather, rows of 64 bytes |" in (tmp_path / "kernels.md").read_text()
