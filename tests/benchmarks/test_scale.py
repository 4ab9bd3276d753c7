"""The scale model at a small size: its layouts are those that it says, and its page is made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scale_layouts import Layout
from benchmarks.scale_page import targets
from benchmarks.scale_part import layouts
from dscheck.save.merge import merge


@pytest.mark.parametrize("name", layouts(tiny=True))
def test_each_layout_tiles_its_tensors_without_an_exception(name: str) -> None:
    layout: Layout = layouts(tiny=True)[name]
    merged = merge([layout.claims(rank) for rank in range(layout.ranks)], 4096)
    merged.plan.validate()
    assert list(merged.plan.untiled()) == []
    assert (merged.exceptions, merged.rivals.regions) == ({}, [])
    assert merged.plan.fragments.nbytes.sum() == sum(row.nbytes for row in merged.plan.tensors)


def test_layouts_of_one_model_have_its_tensors_alike() -> None:
    made = layouts(tiny=True)
    plans = [merge([made[name].claims(r) for r in range(made[name].ranks)], 4096).plan for name in ("fsdp", "megatron")]
    assert plans[0].tensors == plans[1].tensors


def test_targets_are_of_the_layout_that_takes_most() -> None:
    def load(seconds: float, peak: float) -> dict[str, float]:
        return {"open_s": 0.1, "plan_s": seconds, "reads_s": 0.1, "peak_bytes": peak}

    def plan(nbytes: int, proof: float, *loads: dict[str, float]) -> dict[str, Any]:
        return {"plan_bytes": nbytes, "fragments": 100, "proof_s": proof, "loads": loads}

    store = [{"ranks": 10, "steady": {"decide_plan_s": took, "decide_arrive_s": took}} for took in (0.001, 0.004)]
    result = {
        "curve": [plan(1700, 1.0)],
        "saved": [plan(100, 11.0, load(0.7, 1e8)), plan(100, 2.0, load(0.9, 2e8), load(0.1, 1e9))],
        "store": store,
    }
    found = list(targets(result))
    assert [target.measured for target in found] == ["1.1 s", "1 GB", "17 B a fragment", "11 s", "0.8 ms a rank"]
    assert [target.verdict for target in found] == ["missed", "reached", "missed", "missed", "reached"]


def test_the_tiny_model_makes_its_page(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.scale", "--tiny", "--ranks", "4", "--dir", tmp_path, "--out", tmp_path]
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=240, cwd=Path(__file__).parents[2], check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "scale.json").read_text())
    assert [plan["ranks"] for plan in found["saved"]] == [32, 32, 32]
    assert [load["ranks"] for load in found["saved"][0]["loads"]] == [32, 16, 32]
    assert "| one rank's load plan | at most 1 s |" in done.stdout
    assert (tmp_path / "scale.md").read_text() == done.stdout.rstrip("\n") + "\n"
    assert {"scale.json", "scale.md"} == {path.name for path in tmp_path.iterdir()}
