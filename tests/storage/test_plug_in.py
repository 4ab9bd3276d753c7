"""A package that is installed beside dscheck adds a scheme; what is wrong with one is said by its name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from dscheck.errors import ConfigError
from dscheck.storage import open_storage
from tests.storage import plug_in

DSCHECK = "import sys; from dscheck.cli import main; main()"


def run(site: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python, with what is installed in `site`."""
    path = os.pathsep.join([str(site), str(Path(__file__).parents[2])])
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        cwd=site.parent,
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plug-in") / "site"
    plug_in.install(folder)
    return folder


def test_a_package_that_is_installed_saves_and_loads_and_the_commands_find_it(site: Path, tmp_path: Path) -> None:
    root = f"sqlite://{tmp_path}/run.db"
    script = f"""
        import torch
        from dscheck import Checkpointer
        model = torch.nn.Linear(300, 500)
        expected = model.weight.detach().clone()
        options = {{"patience_s": 20.0}}
        with Checkpointer({root!r}, {{"model": model}}, storage_options=options) as ckpt:
            ckpt.save(7).wait()
        with torch.no_grad():
            model.weight.zero_()
        with Checkpointer({root!r}, {{"model": model}}, storage_options=options) as ckpt:
            assert ckpt.load() == 7
        assert torch.equal(model.weight, expected)
        assert type(ckpt.storage).__module__ == "dscheck_sqlite"
    """
    done = run(site, "-W", "error", "-c", textwrap.dedent(script))
    assert done.returncode == 0, done.stderr
    listed = run(site, "-c", DSCHECK, "ls", root, "--json")
    assert [row["step"] for row in json.loads(listed.stdout)] == [7]
    verified = run(site, "-c", DSCHECK, "verify", root, "--json", DSCHECK_STORAGE_OPTIONS='{"patience_s": 20.0}')
    assert json.loads(verified.stdout) == {"step": 7, "damage": []}, verified.stderr


def test_the_example_satisfies_the_facts_in_its_ten_lines(site: Path, tmp_path: Path) -> None:
    (tmp_path / "test_sqlite.py").write_text(plug_in.TESTS)
    done = run(site, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path / "test_sqlite.py"))
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on sys.path, for packages that are not what they should be."""
    folder = tmp_path / "site"
    monkeypatch.syspath_prepend(str(folder))
    return folder


def test_two_packages_for_one_scheme_are_an_error_that_names_both(broken: Path) -> None:
    plug_in.install(broken, name="one-package", points={"twice": "one_package:open_sqlite"})
    plug_in.install(broken, name="another-package", points={"twice": "another_package:open_sqlite"})
    with pytest.raises(ConfigError, match=r"one_package:open_sqlite' of one-package 1\.0") as caught:
        open_storage("twice:///a")
    assert "'another_package:open_sqlite' of another-package 1.0" in str(caught.value)
    assert "uninstall all but one" in str(caught.value)


CARELESS = """
from dscheck.storage import MemoryStorage

class Careless(MemoryStorage):
    url = "bad://me:planted-password@host"

def open_it(url, options):
    return Careless()
"""


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("import no_such_module", "cannot be imported: ModuleNotFoundError"),
        ("raise RuntimeError('planted at import')", "cannot be imported: RuntimeError: planted at import"),
        ("def open_it(url): ...", r"cannot open 'bad://\*\*\*@host': TypeError"),
        (
            "def open_it(url, options): raise OSError(url)",
            r"cannot open 'bad://\*\*\*@host': OSError: bad://\*\*\*@host",
        ),
        (
            "def open_it(url, options): return 7",
            "returned an object of type int, which is no dscheck.storage.Storage: it lacks url, put",
        ),
        (
            CARELESS,
            "shows credentials in its `url`",
        ),
    ],
)
def test_a_plug_in_that_fails_is_named(broken: Path, module: str, expected: str) -> None:
    name = f"bad-{abs(hash(module))}"
    plug_in.install(broken, name=name, module=module, points={"bad": f"{name.replace('-', '_')}:open_it"})
    with pytest.raises(ConfigError, match=expected) as caught:
        open_storage("bad://me:planted-password@host")
    assert f"of {name} 1.0" in str(caught.value)
    assert "planted-password" not in str(caught.value)


def test_a_plug_in_has_a_scheme_that_fsspec_knows_too(broken: Path) -> None:
    module = "from dscheck.storage import MemoryStorage\ndef open_it(url, options): return MemoryStorage()"
    plug_in.install(broken, name="own-gcs", module=module, points={"gcs": "own_gcs:open_it"})
    assert open_storage("gcs://bucket/run").url.startswith("memory://private")


def test_an_error_of_dscheck_passes_through_a_plug_in(broken: Path) -> None:
    module = (
        "from dscheck import ConfigError\ndef open_it(url, options): raise ConfigError('patience: expected seconds')"
    )
    plug_in.install(broken, name="strict-package", module=module, points={"strict": "strict_package:open_it"})
    with pytest.raises(ConfigError, match=r"^patience: expected seconds$"):
        open_storage("strict://a")


def test_looking_at_a_local_root_scans_nothing_and_imports_no_fsspec(site: Path, tmp_path: Path) -> None:
    script = f"""
        import sys
        from dscheck.storage import open_storage
        for root in ({str(tmp_path)!r}, "file://{tmp_path}", "memory://a"):
            list(open_storage(root).list(""))
        print({{"fsspec", "importlib.metadata", "dscheck.storage.adapter"}} & set(sys.modules))
    """
    assert run(site, "-c", textwrap.dedent(script)).stdout == "set()\n"
