"""A job, and the commands, on roots that fsspec serves; with credentials planted, which show nowhere."""

from __future__ import annotations

import gc
import json
import logging
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dscheck import Checkpointer, DscheckError, NoConditionError
from dscheck.cli.app import app
from dscheck.ranks import Solo
from tests.storage.file_systems import Attic, Cloud, Signed, Vault

SECRETS = {
    "token": "planted-token-1f9c",
    "nested": "planted-nested-77aa",
    "password": "planted/pass@word-3b",
    "signature": "planted-signature-c0de",
}


@pytest.fixture(autouse=True)
def emptied() -> Iterator[None]:
    yield
    Cloud.objects.clear()
    Cloud.broken.clear()
    Vault.store.clear()


def run(root: str, step: int, **settings: Any) -> torch.Tensor:
    """Load what is there, save `step`; the tensor that was saved."""
    state = {"x": torch.arange(300_000.0) * step, "n": {"step": step}}
    with Checkpointer(root, state, ranks=Solo(), rng=False, timeout_s=30, **settings) as ckpt:
        ckpt.load()
        state["x"].copy_(torch.arange(300_000.0) * step)
        ckpt.save(step).wait()
    return state["x"].clone()


@pytest.mark.parametrize(
    ("root", "settings"),
    [
        (f"{Cloud.protocol}://bucket/run", {"storage_options": {"token": SECRETS["token"]}}),
        (f"{Vault.protocol}://run", {"commit": "single-writer"}),
        (f"{Attic.protocol}://HERE/run", {"commit": "single-writer"}),
    ],
)
def test_a_job_saves_and_loads_and_the_commands_look(root: str, settings: dict[str, Any], tmp_path: Path) -> None:
    root = root.replace("HERE", str(tmp_path))
    run(root, 3, **settings)
    expected = run(root, 7, **settings)
    state = {"x": torch.zeros(300_000), "n": {"step": 0}}
    with Checkpointer(root, state, ranks=Solo(), rng=False, storage_options=settings.get("storage_options")) as ckpt:
        assert ckpt.load() == 7
        assert ckpt.steps() == [3, 7]
    assert torch.equal(state["x"], expected)
    options = ["--storage-options", json.dumps(settings.get("storage_options", {}))]
    commands = CliRunner()
    listed = commands.invoke(app, ["ls", root, "--json", *options])
    assert [(row["step"], row["history"]) for row in json.loads(listed.stdout)] == [(3, "live"), (7, "newest")]
    assert root in commands.invoke(app, ["ls", root, *options], env={"COLUMNS": "300"}).stdout
    inspected = commands.invoke(app, ["inspect", root, "--json", *options])
    assert [row["tensor"] for row in json.loads(inspected.stdout)["rows"]] == ["x"]
    assert json.loads(commands.invoke(app, ["verify", root, "--json", *options]).stdout)["damage"] == []
    assert commands.invoke(app, ["plan", root, "--to", "fsdp=2", *options]).exit_code == 0


@pytest.mark.filterwarnings("ignore:dscheck:RuntimeWarning")
def test_a_file_system_without_condition_is_refused_and_nothing_is_left_there() -> None:
    with pytest.raises(NoConditionError, match=r"vault://run: .*Vault has no put-if-absent .*single-writer"):
        run("vault://run", 1)
    assert Vault.store == {}


def test_bad_options_on_the_command_line_are_not_repeated() -> None:
    for options in ('{"token": "planted', '"planted"'):
        done = CliRunner().invoke(app, ["ls", "cloud://bucket/run"], env={"DSCHECK_STORAGE_OPTIONS": options})
        assert isinstance(done.exception, DscheckError)
        assert "planted" not in str(done.exception) + done.output


def everything_said(caplog: pytest.LogCaptureFixture, act: Callable[[], object]) -> str:
    """Logs, warnings, and the exception of `act` with its traceback, its causes and its fields."""
    caplog.clear()
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.DEBUG, "dscheck"):
        warnings.simplefilter("always")
        said = []
        try:
            act()
        except DscheckError as error:
            # Of the lines of source that a traceback quotes none holds a secret: they are all in SECRETS.
            said += [*traceback.format_exception(error), repr(error), repr(error.fields)]
        gc.collect()
        return "\n".join([*said, *(str(one.message) for one in caught), caplog.text])


def job(root: str, step: int, folder: Path, options: dict[str, Any]) -> Callable[[], object]:
    return lambda: run(root, step, storage_options=options, trace=str(folder / "traces"), on_failure="raise")


def test_credentials_show_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Saves, loads and failures of each verb, whose errors tell the token; every text that comes of it is searched."""
    root = f"{Signed.protocol}://me:{SECRETS['password']}@bucket/run?sig={SECRETS['signature']}"
    options = {"token": SECRETS["token"], "client_kwargs": {"secret_key": SECRETS["nested"]}}
    said = [everything_said(caplog, job(root, 1, tmp_path, options))]
    assert "StorageError" not in said[0]
    failing = 0
    for verb in ("put", "upload", "look", "list", "get", "delete"):
        Cloud.broken.add(verb)
        said.append(everything_said(caplog, job(root, 2 + failing, tmp_path, options)))
        failing += "forbidden" in said[-1]
        for command in (["ls"], ["inspect"], ["verify"]):
            arguments = [*command, root, "--storage-options", json.dumps(options)]
            done = CliRunner().invoke(app, arguments)
            said += [done.output, str(done.exception)]
        Cloud.broken.clear()
    assert failing == 5  # nothing is deleted
    assert sum("with token *** at signed://***@" in text for text in said) >= failing
    with Checkpointer(root, {"x": torch.ones(1)}, ranks=Solo(), rng=False, storage_options=options) as ckpt:
        said += [repr(ckpt), repr(ckpt.storage), ckpt.storage.url, repr(ckpt.settings), str(ckpt.latest())]
    traces = list((tmp_path / "traces").iterdir())
    assert traces
    stored = [data.decode("latin-1") for data in Cloud.objects.values()]
    assert stored
    for text in (*said, *(path.read_text() for path in traces), *stored):
        for secret in SECRETS.values():
            assert secret not in text
    assert re.search(r"signed://\*\*\*@bucket/run\?\*\*\*", "".join(said))


@pytest.mark.parametrize(
    "root",
    [
        f"cloud://me:{SECRETS['password']}@bucket/run",
        f"sftp://me:{SECRETS['password']}@127.0.0.1/run",
        f"absent://{SECRETS['token']}@bucket/run",
        f"nobody://me:{SECRETS['password']}@host/run?sig={SECRETS['signature']}",
        f"file://me:{SECRETS['password']}@host/run",
        f"zip::cloud://me:{SECRETS['password']}@bucket/run",
        f"ftp://me:{SECRETS['password']}@127.0.0.1:1/run",
        f"cloud://bucket/run?sig={SECRETS['signature']}",
    ],
)
def test_a_url_that_cannot_be_opened_is_shown_without_its_password(root: str, caplog: pytest.LogCaptureFixture) -> None:
    said = everything_said(caplog, lambda: run(root, 1, storage_options={}))
    said += CliRunner().invoke(app, ["ls", root]).output
    assert "ConfigError" in said or "StorageError: cannot reach" in said
    assert not [secret for secret in SECRETS.values() if secret in said]
