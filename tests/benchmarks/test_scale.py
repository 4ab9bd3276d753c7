"""The scale model at a small size: its layouts are those that it says, and its page is made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.scale_layouts import Layout
from benchmarks.scale_part import layouts
from dscheck.save.merge import merge


@pytest.mark.parametrize("name", layouts(tiny=True))
def test_each_layout_tiles_its_tensors_without_an_exception(name: str) -> None:
    layout: Layout = layouts(tiny=True)[name]
    merged = merge([layout.claims(rank) for rank in range(layout.ranks)], 4096)
    merged.plan.validate()
    assert list(merged.plan.untiled()) == []
    assert (merged.exceptions, merged.rivals.regions) == ({}, [])
    assert merged.nbytes == sum(row.nbytes for row in merged.plan.tensors)


def test_layouts_of_one_model_have_its_tensors_alike() -> None:
    made = layouts(tiny=True)
    plans = [merge([made[name].claims(r) for r in range(made[name].ranks)], 4096).plan for name in ("fsdp", "megatron")]
    assert plans[0].tensors == plans[1].tensors


def test_the_tiny_model_makes_its_page(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.scale", "--tiny", "--ranks", "4", "--dir", tmp_path, "--out", tmp_path]
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=240, cwd=Path(__file__).parents[2], check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "scale.json").read_text())
    assert [plan["ranks"] for plan in found["saved"]] == [32, 32, 32]
    assert [load["ranks"] for load in found["saved"][0]["loads"]] == [32, 16, 32]
    assert (tmp_path / "scale.md").read_text() == done.stdout.rstrip("\n") + "\n"
    assert {"scale.json", "scale.md"} == {path.name for path in tmp_path.iterdir()}
