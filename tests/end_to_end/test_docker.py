"""What docker/compose.yaml starts in containers, started without them: its scripts and environments, on loopback."""

from __future__ import annotations

import os
import signal
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from dscheck.commit import read_history
from dscheck.storage import open_storage
from dscheck.testing.servers import die_with_parent, free_ports

REPOSITORY = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((REPOSITORY / "docker/compose.yaml").read_text())
LIMIT_S = 120.0


@contextmanager
def started(service: str, log: Path, changes: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """The command of a service, in its environment but for `changes`. It is gone afterwards."""
    described = COMPOSE["services"][service]
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["sh", *described["command"]],
            cwd=REPOSITORY,
            env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **described["environment"], **changes},
            stdout=out,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def await_answer(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + LIMIT_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except urllib.error.HTTPError:
            return  # it asks who we are
        except OSError:
            time.sleep(0.1)
        else:
            return
    pytest.fail(f"no answer from {url}:\n{log.read_text()}")


def test_two_nodes_train_into_the_s3_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s3, master, volume, filer, admin, rendezvous = free_ports(6)
    others = f"-master.port={master} -volume.port={volume} -filer.port={filer} -admin.port={admin}"
    server = {"ADDRESS": "127.0.0.1", "PORT": str(s3), "DATA": str(tmp_path), "MORE": others}
    reached = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3}", "RENDEZVOUS": f"127.0.0.1:{rendezvous}"}
    small = {"ADDRESS": "127.0.0.1", "RANKS_A_NODE": "1", "TP": "1", "STEPS": "2", "SAVE_EVERY": "1"}
    logs = [tmp_path / f"{service}.log" for service in ("s3", "train-0", "train-1")]
    with started("s3", logs[0], server) as weed:
        await_answer(reached["AWS_ENDPOINT_URL"], weed, logs[0])
        with (
            started("train-0", logs[1], reached | small) as first,
            started("train-1", logs[2], reached | small) as second,
        ):
            ended = [process.wait(LIMIT_S) for process in (first, second)]
        assert ended == [0, 0], "\n".join(log.read_text() for log in logs[1:])
        environment = COMPOSE["services"]["train-0"]["environment"]
        for name, value in {**environment, **reached}.items():
            monkeypatch.setenv(name, value)
        history = read_history(open_storage(environment["ROOT"]))
        assert history.newest is not None
        assert history.newest.step == 2


def test_the_containers_have_what_their_commands_name() -> None:
    image = (REPOSITORY / "docker/Dockerfile").read_text()
    for service in COMPOSE["services"].values():
        (script,) = service["command"]
        assert (REPOSITORY / script).is_file()
        assert script in image
        assert service["build"]["dockerfile"] == "docker/Dockerfile"
        assert f"AS {service['build']['target']}\n" in image
