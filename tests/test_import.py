"""`import dscheck` is cheap and needs no GPU (invariant C13), and offers every public name."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

import dscheck
import dscheck.errors

HEAVY = {"torch", "pyarrow", "numpy", "fsspec"}


def test_import_loads_no_heavy_module() -> None:
    code = "import sys, dscheck; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert HEAVY.isdisjoint(printed.split())


def test_every_error_is_a_public_name() -> None:
    errors = {
        name
        for name, value in vars(dscheck.errors).items()
        if isinstance(value, type) and issubclass(value, dscheck.DscheckError)
    }
    assert errors <= set(dscheck.__all__)


def test_lazy_names_are_announced() -> None:
    assert set(dscheck._LAZY) <= set(dscheck.__all__) <= set(dir(dscheck))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'checkpoint'"):
        _ = dscheck.checkpoint


def test_version_is_that_of_the_project() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert dscheck.__version__ == project["version"]


def test_a_save_and_a_load_do_not_import_pandas(tmp_path: Path) -> None:
    """pyarrow does, where it is installed, in most ways to an array: 0.3 s of training's time in its first save."""
    (tmp_path / "pandas").mkdir()
    (tmp_path / "pandas" / "__init__.py").write_text("raise SystemExit('pandas was imported')\n")
    script = f"""
        import torch
        from dscheck import Checkpointer
        state = {{"x": torch.zeros(10), "scheduler": {{"rates": [0.1, 0.2]}}}}
        with Checkpointer({str(tmp_path / "root")!r}, state) as ckpt:
            ckpt.save(1).wait()
        with Checkpointer({str(tmp_path / "root")!r}, state) as ckpt:
            assert ckpt.load() == 1
        import sys
        assert "pandas" not in sys.modules
    """
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
