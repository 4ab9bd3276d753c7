"""The benchmark of codecs, on a state that was trained for two steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import codecs
from benchmarks.launch import REPOSITORY


def run(module: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"benchmarks.{module}", *options]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200, check=False)


def test_codecs_writes_its_page_and_leaves_no_saves(tmp_path: Path) -> None:
    trained = run("demo_train", str(tmp_path / "run"), "--steps", "2", "--save-every", "2")
    assert trained.returncode == 0, trained.stderr
    sizes = ["--mb", "2", "--save-mb", "8", "--rounds", "1"]
    done = run("codecs", str(tmp_path / "run"), *sizes, "--folder", str(tmp_path), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out" / "codecs.json").read_text())["rates"]
    ratios = {(row["kind"], row["codec"]): row["ratio"] for row in rows}
    assert len(ratios) == 8
    assert ratios["bf16 weights", "shuffle-zstd"] > 1.2
    assert "| fp32 Adam exp_avg | shuffle-zstd |" in (tmp_path / "out" / "codecs.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_a_block_that_comes_back_changed_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = codecs.decode

    def wrong(encoded: Any, out: Any) -> None:
        plain(encoded, out)
        out[0] ^= 1

    monkeypatch.setattr(codecs, "decode", wrong)
    with pytest.raises(codecs.WrongBytesError, match="weights by zstd"):
        list(codecs.rates({"weights": [codecs.torch.ones(1000)]}, 1 << 20, 1))


def test_targets_are_of_auto_against_none() -> None:
    links = [{"link": "a disk", "seconds": {"none": 2.0, "auto": auto}} for auto in (2.0, 2.1)]
    assert [target.verdict for target in codecs.targets(links)] == ["reached", "missed"]
