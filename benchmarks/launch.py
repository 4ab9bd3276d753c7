"""Run a module of this repository on some ranks and wait, never for ever."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.distributed as dist

REPOSITORY = Path(__file__).resolve().parents[1]
PATIENCE_S = 30.0


def run_ranks(
    ranks: int,
    module: str,
    arguments: Sequence[object],
    *,
    log: Path,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
) -> int:
    """The exit status of `python -m module`, under torchrun on more than one rank; its output is in `log`.

    Nothing of it runs on afterwards, whatever happens. Raises TimeoutError past `timeout_s`.
    """
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    command = [sys.executable, "-m", *(torchrun if ranks > 1 else []), module, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | dict(env or {})
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(
            f"{module} on {ranks} ranks did not end within {timeout_s:.0f} s:\n{trouble(log)}"
        ) from error
    finally:
        stop(process)


def leave_group() -> None:
    """End this process well. Its process group is not taken down by the interpreter's end, in which gloo's threads
    sometimes abort it ("terminate called without an active exception", 2 of 20 runs on torch 2.13 that saved nothing).
    """
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End `process`. torchrun ends its ranks, which are sessions of their own, when it is asked to end itself."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def trouble(log: Path, limit: int = 40) -> str:
    """The lines of a log that are likely to say why: from the first traceback on, else the last ones."""
    lines = log.read_text(errors="replace").rstrip().split("\n")
    first = next((index for index, line in enumerate(lines) if "Traceback" in line), max(0, len(lines) - limit))
    return "\n".join(lines[first : first + limit])
