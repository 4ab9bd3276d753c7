"""`gc`, `rm`, `pin` and what `ls` shows of them, as a person uses them: output, exit codes, and what they refuse."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dscheck.commit import StepRef, read_history
from dscheck.storage import LocalStorage
from tests.cli.test_commands import WHOLE, dscheck
from tests.commit.jobs import Job, assert_complete


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """100, 200 and 210 are live, 300 is abandoned, 400 was never committed."""
    path = tmp_path / "root"
    old = Job.start(LocalStorage(path))
    for step in (100, 200, 300):
        old.save(step)
    old.write(400, 0)
    Job.start(LocalStorage(path), step=200).save(210)
    return path


def steps(root: Path) -> list[tuple[int, str]]:
    rows: list[dict[str, Any]] = json.loads(dscheck("ls", str(root), "--json").stdout)
    return [(row["step"], row["history"]) for row in rows]


def test_gc_says_what_goes_and_a_dry_run_what_would(root: Path) -> None:
    data = root / "steps/400/1/data-0.bin"
    found = dscheck("gc", str(root), "--dry-run")
    assert found.returncode == 0
    assert "never committed: 400 of term 1" in found.stdout
    assert "would free" in found.stdout
    assert data.exists()
    said = json.loads(dscheck("gc", str(root), "--dry-run", "--json").stdout)
    done = json.loads(dscheck("gc", str(root), "--json").stdout)
    assert said == {**done, "dry_run": True}
    assert done["attempts"] == [{"step": 400, "term": 1}]
    assert done["bytes"] > 0
    assert not data.exists()
    assert steps(root) == [(100, "live"), (200, "live"), (210, "newest"), (300, "abandoned")]


def test_gc_deletes_abandoned_steps_only_when_it_is_told_to(root: Path) -> None:
    assert "abandoned steps: 300 of term 1" in dscheck("gc", str(root), "--abandoned").stdout
    assert steps(root) == [(100, "live"), (200, "live"), (210, "newest")]
    for ref in read_history(LocalStorage(root)).visible:
        assert_complete(LocalStorage(root), ref)


def test_gc_refuses_a_root_that_it_does_not_understand(root: Path) -> None:
    (root / "records/300-1.kept.json").write_text("?")
    found = dscheck("gc", str(root), "--abandoned")
    assert found.returncode == 1
    assert "dscheck writes no object of this name" in found.stderr
    assert (root / "steps/400/1/data-0.bin").exists()


def test_rm_asks_and_deletes_nothing_where_nobody_can_answer(root: Path) -> None:
    found = dscheck("rm", str(root), "100")
    assert found.returncode == 2
    assert "say --yes" in found.stderr
    found = dscheck("rm", str(root), "100", "--yes")
    assert found.returncode == 0
    assert "deleted step 100 of term 1" in found.stdout
    assert steps(root)[0] == (200, "live")
    again = dscheck("rm", str(root), "100", "--yes")
    assert again.returncode == 1
    assert "step 100 was deleted; committed are 200, 210" in again.stderr


@pytest.mark.parametrize(("answer", "left"), [("n", 4), ("", 4), ("y", 3)])
def test_rm_shows_what_it_would_delete_and_does_it_only_after_a_yes(root: Path, answer: str, left: int) -> None:
    person, program = pty.openpty()
    os.write(person, f"{answer}\n".encode())
    found = subprocess.run(
        [sys.executable, "-c", WHOLE, "rm", str(root), "100"], stdin=program, capture_output=True, text=True, timeout=60
    )
    os.close(person)
    os.close(program)
    assert "step 100 of term 1, committed" in found.stdout
    assert found.returncode == (0 if left == 3 else 1)
    assert len(steps(root)) == left


def test_rm_names_an_abandoned_step_by_its_term(root: Path) -> None:
    found = dscheck("rm", str(root), "300", "--yes")
    assert found.returncode == 1
    assert "term 1" in found.stderr
    found = dscheck("rm", str(root), "300-1", "--yes", "--json")
    assert json.loads(found.stdout)["deleted"] == [{"step": 300, "term": 1}]
    assert "it was deleted" in dscheck("rm", str(root), "300-1", "--yes").stderr
    assert "no step 300 of term 7" in dscheck("rm", str(root), "300-7", "--yes").stderr


@pytest.mark.parametrize("name", ["x", "0300", "300-1-2", "-1", "3.0"])
def test_rm_of_what_is_no_step_is_wrong_usage(root: Path, name: str) -> None:
    assert dscheck("rm", str(root), "--yes", "--", name).returncode == 2
    assert len(steps(root)) == 4


def test_rm_refuses_all_when_one_of_them_is_pinned_or_the_newest(root: Path) -> None:
    assert dscheck("pin", str(root), "200", "--note", "the paper's").returncode == 0
    for name, why in (("200", "is pinned"), ("210", "is the newest one")):
        found = dscheck("rm", str(root), "100", name, "--yes")
        assert found.returncode == 2
        assert why in found.stderr
    assert len(steps(root)) == 4
    assert dscheck("rm", str(root), "200", "210", "--yes", "--force").returncode == 0
    assert steps(root) == [(100, "live"), (300, "newest")]
    assert not list((root / "pins").glob("*"))


def test_a_pin_shows_in_ls_and_is_removed(root: Path) -> None:
    assert "is pinned" in dscheck("pin", str(root), "100", "--note", "the paper's").stdout
    rows = json.loads(dscheck("ls", str(root), "--json").stdout)
    assert [row["pin"] and row["pin"]["note"] for row in rows] == ["the paper's", None, None, None]
    assert "the paper's" in dscheck("ls", str(root)).stdout
    assert dscheck("pin", str(root), "100").returncode == 2
    assert dscheck("pin", str(root), "100", "--remove").returncode == 0
    assert "is not pinned" in dscheck("pin", str(root), "100", "--remove").stderr
    assert dscheck("pin", str(root), "555").returncode == 1
    assert dscheck("pin", str(root), "100", "--note", "x" * 1001).returncode == 2


def test_a_pinned_abandoned_step_outlives_gc(root: Path) -> None:
    assert dscheck("pin", str(root), "300-1").returncode == 0
    assert "abandoned" not in dscheck("gc", str(root), "--abandoned").stdout
    assert_complete(LocalStorage(root), StepRef(300, 1))


def test_gc_rm_and_pin_need_neither_torch_nor_pyarrow(root: Path) -> None:
    code = (
        "import sys, dscheck.cli.gc as gc, dscheck.cli.rm as rm, dscheck.cli.pin as pin; r = sys.argv[1]; "
        "gc.show(r, False, True, 24.0, False); pin.show(r, '200', False, ''); rm.show(r, ['100'], True, False, False); "
        "print(sorted(sys.modules.keys() & {'torch', 'pyarrow', 'fsspec'}))"
    )
    assert dscheck(str(root), code=code).stdout.splitlines()[-1] == "[]"
