"""The command line as a person uses it: output, exit codes, and what it costs to start."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dscheck import Checkpointer, sharded
from dscheck.ranks.base import Ranks
from tests.end_to_end.worlds import job, open_on

WHOLE = "import sys; from dscheck.cli import main; sys.argv[0] = 'dscheck'; main()"


def dscheck(*arguments: str, code: str = WHOLE) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps by two ranks; step 2 of an abandoned branch too."""
    path: Path = tmp_path_factory.mktemp("cli") / "root"

    def run(ranks: Ranks) -> None:
        rows = torch.full((300, 500), float(ranks.rank))
        state = {"model": {"w": sharded(rows, (600, 500), (300 * ranks.rank, 0)), "b": torch.ones(3)}, "n": 7}
        with open_on(ranks, path, state) as ckpt:
            ckpt.save(1).wait()
            ckpt.save(2).wait()
            ckpt.load(1)
            ckpt.save(3).wait()

    job(2, run)
    return path


def damaged(root: Path, to: Path, step: int = 3) -> Path:
    """A copy of the root with one bit flipped in a data file of `step`, and that file."""
    for source in root.rglob("*"):
        if source.is_file():
            target = to / source.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    path = next(to.glob(f"steps/{step}/*/data-1.bin"))
    data = bytearray(path.read_bytes())
    data[300_000] ^= 4
    path.write_bytes(data)
    return to


def test_ls_shows_steps_sizes_ranks_and_which_history_they_are_of(root: Path) -> None:
    found = dscheck("ls", str(root), "--json")
    assert found.returncode == 0
    rows = json.loads(found.stdout)
    assert [(row["step"], row["history"], row["ranks"]) for row in rows] == [
        (1, "live", 2),
        (2, "abandoned", 2),
        (3, "newest", 2),
    ]
    assert rows[0]["bytes"] == 600 * 500 * 4 + 12
    table = dscheck("ls", str(root)).stdout
    assert all(word in table for word in ("step", "committed", "size", "ranks", "took", "1.2 MB", "abandoned"))


def test_ls_needs_neither_torch_nor_pyarrow(root: Path) -> None:
    code = (
        "import sys; from dscheck.cli.ls import show; show(sys.argv[1], False); "
        "print(sorted(sys.modules.keys() & {'torch', 'pyarrow', 'fsspec'}))"
    )
    assert dscheck(str(root), code=code).stdout.splitlines()[-1] == "[]"


def test_ls_takes_under_half_a_second(root: Path) -> None:
    """Of processor time, the best of three: the machine may be busy."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert dscheck("ls", str(root)).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)

    assert min(seconds() for _ in range(3)) < 0.5


def test_inspect_shows_tensors_and_who_holds_and_wrote_their_fragments(root: Path) -> None:
    rows = json.loads(dscheck("inspect", str(root), "--json").stdout)["rows"]
    assert [(row["tensor"], row["dtype"], row["shape"], row["fragments"]) for row in rows] == [
        ("model.b", "float32", [3], 1),
        ("model.w", "float32", [600, 500], 2),
    ]
    rows = json.loads(dscheck("inspect", str(root), "1", "--tensor", "model.w", "--json").stdout)["rows"]
    assert [(row["region"], row["held by"], row["written by"]) for row in rows] == [
        ("[0:300, 0:500]", [0], 0),
        ("[300:600, 0:500]", [1], 1),
    ]
    assert "model.w" in dscheck("inspect", str(root)).stdout


def test_inspect_verify_and_plan_know_of_codecs(tmp_path: Path) -> None:
    zeros, noise = torch.zeros(1 << 20), torch.randint(0, 256, (1 << 20,), dtype=torch.uint8)
    with Checkpointer(tmp_path, {"m": {"zeros": zeros, "noise": noise}}, codec="shuffle-zstd") as ckpt:
        ckpt.save(1).wait(60)
    rows = {row["tensor"]: row for row in json.loads(dscheck("inspect", str(tmp_path), "--json").stdout)["rows"]}
    assert (rows["m.noise"]["codec"], rows["m.noise"]["stored"], rows["m.noise"]["ratio"]) == ("none", 1 << 20, 1.0)
    assert (rows["m.zeros"]["codec"], rows["m.zeros"]["bytes"]) == ("shuffle-zstd", 4 << 20)
    assert rows["m.zeros"]["ratio"] > 1000
    fragment = json.loads(dscheck("inspect", str(tmp_path), "--tensor", "m.zeros", "--json").stdout)["rows"][0]
    assert {name: fragment[name] for name in ("codec", "stored")} == {
        name: rows["m.zeros"][name] for name in ("codec", "stored")
    }
    shown = dscheck("inspect", str(tmp_path)).stdout
    assert "stored, written by" in shown
    (plan,) = json.loads(dscheck("plan", str(tmp_path), "--to", "dp=1", "--json").stdout)["rows"]
    assert plan["wanted"] == 5 << 20
    assert 1 << 20 < plan["read"] < 1.1 * (1 << 20)
    assert dscheck("verify", str(tmp_path)).returncode == 0
    path = next(tmp_path.glob("steps/1/1/data-0.bin"))
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.unlink()
    path.write_bytes(data)
    found = dscheck("verify", str(tmp_path))
    assert found.returncode == 1
    assert "m.noise" in found.stdout


def test_inspect_of_a_name_that_is_not_there_names_close_ones(root: Path) -> None:
    found = dscheck("inspect", str(root), "--tensor", "model.ww")
    assert found.returncode == 1
    assert "close are model.w" in found.stderr


def test_verify_reads_every_block_and_says_that_all_is_well(root: Path) -> None:
    found = dscheck("verify", str(root))
    assert found.returncode == 0
    assert "0 damaged" in found.stdout


def test_verify_lists_what_is_damaged_and_exits_with_1(root: Path, tmp_path: Path) -> None:
    copy = damaged(root, tmp_path / "copy")
    found = dscheck("verify", str(copy), "3", "--json")
    assert found.returncode == 1
    damage: list[dict[str, Any]] = json.loads(found.stdout)["damage"]
    assert [(row["key"].split("/")[-1], row["offset"]) for row in damage] == [("data-1.bin", 262_144)]
    assert "model.w" in damage[0]["what"]
    assert dscheck("verify", str(copy), "1").returncode == 0


@pytest.mark.parametrize("lost", ["data-1.bin", "files.arrow"])
def test_verify_names_an_object_that_is_gone(root: Path, tmp_path: Path, lost: str) -> None:
    copy = damaged(root, tmp_path / "copy")
    next(copy.glob(f"steps/3/*/{lost}")).unlink()
    found = dscheck("verify", str(copy))
    assert found.returncode == 1
    assert lost in found.stdout + found.stderr


@pytest.mark.parametrize("command", ["ls", "inspect", "verify"])
def test_a_wrong_root_is_one_line_on_stderr_and_creates_nothing(command: str, tmp_path: Path) -> None:
    for wrong, code in ((tmp_path / "nowhere", 1), (Path(__file__), 2), ("s4://x/y", 2)):
        found = dscheck(command, str(wrong))
        assert found.returncode == code
        assert found.stderr.startswith("dscheck: ")
        assert "Traceback" not in found.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_is_not_there_says_which_are(root: Path) -> None:
    found = dscheck("inspect", str(root), "9")
    assert found.returncode == 1
    assert "committed are 1, 3" in found.stderr


def test_a_root_of_a_plain_python_process_has_one_rank(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, {"x": torch.ones(2)}) as ckpt:
        ckpt.save(1)
    assert json.loads(dscheck("ls", str(tmp_path), "--json").stdout)[0]["ranks"] == 1


def test_plan_says_what_each_rank_would_read(root: Path) -> None:
    found = dscheck("plan", str(root), "3", "--to", "fsdp=2,dp=2", "--gb-per-s", "0.001", "--json")
    assert found.returncode == 0, found.stderr
    plan = json.loads(found.stdout)
    assert (plan["step"], plan["ranks"], plan["on_every_stage"]) == (3, 4, [])
    assert [row["ranks"] for row in plan["rows"]] == [[0, 2], [1, 3]]
    for row, bias in zip(plan["rows"], (2, 1), strict=True):
        assert row["wanted"] == 300 * 500 * 4 + 4 * bias
        assert row["wanted"] < row["read"] < row["wanted"] + 20_000
        assert row["seconds"] == round(row["read"] / 1e6, 3)
    assert plan["rows"][0]["files"] + plan["rows"][1]["files"] in (3, 4)
    table = dscheck("plan", str(root), "--to", "tp=2").stdout
    assert all(word in table for word in ("wanted", "files", "all ranks, each by itself", "docs/plan.md"))


def test_plan_names_what_its_rule_does_not_place(root: Path) -> None:
    shown = dscheck("plan", str(root), "--to", "pp=2").stdout
    assert "model.b, model.w" in shown
    placed = dscheck("plan", str(root), "--to", "pp=2", "--cut", "model:pp=0", "--json")
    rows = json.loads(placed.stdout)["rows"]
    assert [(row["stage"], row["wanted"]) for row in rows] == [(0, 600 * 500 * 4 + 12), (1, 0)]
    alone = dscheck("plan", str(root), "--to", "dp=2", "--only", "model.b", "--json")
    assert [row["wanted"] for row in json.loads(alone.stdout)["rows"]] == [12]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--to", "tp"],
        ["--to", "tp=2", "--cut", "x"],
        ["--to", "tp=2", "--only", "y"],
        ["--to", "tp=2", "--gb-per-s", "nan"],
        [],
    ],
)
def test_plan_refuses_what_it_cannot_read(root: Path, arguments: list[str]) -> None:
    found = dscheck("plan", str(root), *arguments)
    assert found.returncode == 2
    assert "--" in found.stderr


def test_probe_prints_what_the_storage_gives_and_what_dscheck_reaches(tmp_path: Path) -> None:
    done = dscheck("probe", str(tmp_path), "--size", "2", "--seconds", "0")
    assert done.returncode == 0, done.stderr
    assert "direct, 1 x 4 MiB" in done.stdout
    assert "dscheck, defaults" in done.stdout
    assert "stored for later jobs" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == [".dscheck-tuning.json"]


def test_probe_as_json_stores_nothing_when_told_so(tmp_path: Path) -> None:
    done = dscheck("probe", str(tmp_path), "--size", "2", "--seconds", "0", "--no-keep", "--json")
    found = json.loads(done.stdout)
    assert found["bytes"] == 2 * 10**6
    assert found["dscheck"][0]["settings"] == {}
    assert found["stored"] is None
    assert list(tmp_path.iterdir()) == []


def test_probe_of_what_is_no_file_system_is_wrong_usage() -> None:
    done = dscheck("probe", "memory://run")
    assert done.returncode == 2
    assert "measures file systems" in done.stderr


def test_cp_copies_and_a_second_run_finds_all_of_it_there(root: Path, tmp_path: Path) -> None:
    to = str(tmp_path / "copy")
    dry = dscheck("cp", str(root), to, "--dry-run", "--json")
    assert [row["outcome"] for row in json.loads(dry.stdout)] == ["to copy", "to copy"]
    assert not (tmp_path / "copy").exists()
    first = dscheck("cp", str(root), to, "--json")
    assert [(row["step"], row["outcome"]) for row in json.loads(first.stdout)] == [(1, "copied"), (3, "copied")]
    assert dscheck("verify", to).returncode == 0
    second = dscheck("cp", str(root), to)
    assert second.returncode == 0
    assert second.stdout.count("there") == 2


def test_cp_of_a_damaged_step_fails_and_leaves_the_steps_before_it(root: Path, tmp_path: Path) -> None:
    source, to = damaged(root, tmp_path / "source"), str(tmp_path / "copy")
    found = dscheck("cp", str(source), to)
    assert found.returncode == 1
    assert "crc32c" in found.stderr
    assert [row["step"] for row in json.loads(dscheck("ls", to, "--json").stdout)] == [1]
    only = dscheck("cp", str(source), str(tmp_path / "only"), "--step", "1", "--step", "7")
    assert only.returncode == 1
    assert "there is no step 7" in only.stderr
