"""dscheck, DCP and other packages against the raw disk: save, load and reshard one sharded state, in the same run.

python -m benchmarks.versus                           4 GB on 2 ranks, 3 rounds after a first that warms everything
python -m benchmarks.versus --ranks 8 --device cuda   tensors on the GPUs
python -m benchmarks.versus --gb 0.02 ...             the same, in seconds, for a look at whether it works

Each contender has processes of its own, in which the raw disk is measured beside it, so that one that fails or
needs memory harms none of the others.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.launch import REPOSITORY, run_ranks, trouble
from benchmarks.machine import describe, versions
from benchmarks.raw_disk import WAYS, shown
from benchmarks.rivals import ALL, PACKAGES
from benchmarks.versus_page import page
from benchmarks.versus_rank import OURS, Spec
from dscheck.probe import Way

RESULTS = REPOSITORY / "benchmarks" / "results"
# Keeps freed memory in the process: on a virtual machine the host takes it back, and touching it again costs more than
# the disk. The same for all contenders.
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
    "MALLOC_ARENA_MAX": "1",
}
# Of one state in the replicas' part, which each rank holds whole.
REPLICA_BYTES = 256 << 20


class BenchmarkError(Exception):
    """A part cannot be run, or went wrong; says why."""


@dataclass(frozen=True, slots=True)
class Versus:
    """All parts, in folders of their own below `folder`, where nothing is left."""

    folder: Path
    nbytes: int
    ranks: int
    rounds: int
    device: str
    drop_caches: bool

    def run(self, spec: Spec, ranks: int) -> dict[str, Any]:
        """What the first rank wrote. Raises BenchmarkError, TimeoutError."""
        log, out = Path(spec.folder).with_suffix(".log"), Path(spec.out)
        limit_s = 120 + (self.rounds + 1) * self.nbytes / 1e9 * 60
        arguments = [json.dumps(asdict(spec))]
        status = run_ranks(ranks, "benchmarks.versus_rank", arguments, log=log, timeout_s=limit_s, env=MALLOC)
        if status != 0:
            raise BenchmarkError(f"{spec.part} of {spec.contender} ended with status {status}:\n{trouble(log)}")
        measured: dict[str, Any] = json.loads(out.read_text())
        return measured

    def spec(self, part: Any, name: str, **given: Any) -> Spec:
        made = self.folder / name
        made.mkdir(exist_ok=True)
        return Spec(
            part=part,
            folder=str(made),
            out=str(made.with_suffix(".json")),
            nbytes=self.nbytes,
            rounds=self.rounds,
            device=self.device,
            drop_caches=self.drop_caches,
            **given,
        )

    def best(self) -> tuple[Way, Way, list[dict[str, Any]]]:
        """How the raw disk is written and read fastest, and the rates of each way."""
        lines = self.run(self.spec("sweep", "sweep"), self.ranks)["lines"]
        rates = [
            {"way": shown(way)}
            | {
                verb: statistics.mean(line[verb] for line in lines if Way(*line["way"]) == way)
                for verb in ("write", "read")
            }
            for way in WAYS
        ]
        write, read = (
            WAYS[max(range(len(rates)), key=lambda index: float(rates[index][verb]))] for verb in ("write", "read")
        )
        return write, read, rates

    def contender(self, name: str, write: Way, read: Way) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Its facts, and a line for each piece of work in each round. Failures of others than dscheck are lines."""
        try:
            version(PACKAGES[name])
        except PackageNotFoundError:
            return {}, [_failed("save", "not installed")]
        spec = self.spec("compare", name.replace(" ", "-"), contender=name, write=write, read=read)
        facts: dict[str, Any] = {}
        lines: list[dict[str, Any]] = []
        try:
            for part, ranks in (("compare", self.ranks), ("fewer", 1), ("more", self.ranks)):
                try:
                    measured = self.run(replace(spec, part=part), ranks)  # type: ignore[arg-type]
                except (BenchmarkError, TimeoutError) as error:
                    if name == OURS:
                        raise
                    why = _reason(str(error)).replace(str(self.folder), "...")
                    lines.append(_failed("save" if part == "compare" else part, why))
                    break
                facts = facts or measured["facts"]
                lines += measured["lines"]
                if any(line["work"] == "save" and "failed" in line for line in lines):
                    break
        finally:
            shutil.rmtree(spec.folder)
        return facts, lines


def measure(versus: Versus, names: Sequence[str], replicas: int) -> dict[str, Any]:
    """Raises BenchmarkError, TimeoutError, OSError."""
    # The state, what a rival leaves behind, and room for what the file system frees late.
    needed, free = int(3.5 * versus.nbytes), shutil.disk_usage(versus.folder).free
    if free < needed:
        raise BenchmarkError(f"{free / 1e9:.1f} GB are free and {needed / 1e9:.1f} GB needed: choose another --dir")
    write, read, rates = versus.best()
    found: dict[str, Any] = {"raw": {"write": shown(write), "read": shown(read), "rates": rates}, "lines": {}}
    for name in names:
        print(f"versus: {name}", file=sys.stderr, flush=True)
        facts, found["lines"][name] = versus.contender(name, write, read)
        found["facts"] = found.get("facts", {}) | facts
    if replicas:
        shared = replace(versus.spec("replicas", "replicas"), nbytes=min(versus.nbytes, REPLICA_BYTES))
        found["replicas"] = versus.run(shared, replicas)["facts"]
    return found


def _failed(work: str, why: str) -> dict[str, Any]:
    return {"who": "contender", "work": work, "first": False, "failed": why}


def _reason(text: str) -> str:
    """The line that names the exception, of what a log holds from its first traceback on."""
    lines = [line.split("]: ")[-1].strip() for line in text.split("\n")]
    named = (line for line in lines if line.split(":")[0].endswith(("Error", "Exception")) and " " not in line[:30])
    return next(named, lines[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gb", type=float, default=4.0, help="size of the whole state, in 1e9 bytes")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds, after one that warms memory and caches")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the tensors live")
    parser.add_argument("--replicas", type=int, default=8, help="ranks that all load one state; 0: none")
    parser.add_argument("--only", nargs="*", default=list(ALL), choices=list(ALL), metavar="NAME", help=", ".join(ALL))
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of versus.json and versus.md")
    parser.add_argument("--keep-caches", action="store_true", help="evict our own files before loads, not all caches")
    given = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="versus-", dir=given.dir) as inner:
            versus = Versus(
                Path(inner), int(given.gb * 1e9), given.ranks, given.rounds, given.device, not given.keep_caches
            )
            measured = measure(versus, given.only, given.replicas)
    except (BenchmarkError, TimeoutError, OSError) as error:
        print(f"benchmarks.versus failed: {error}", file=sys.stderr)
        return 1
    command = f"python -m benchmarks.versus --gb {given.gb:g} --ranks {given.ranks} --rounds {given.rounds}"
    result = {
        "command": command + (" --device cuda" if given.device == "cuda" else ""),
        "machine": describe(given.dir),
        "versions": versions(*_installed(given.only)),
        "ranks": given.ranks,
        "rounds": given.rounds,
        **measured,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "versus.json").write_text(json.dumps(result, indent=1) + "\n")
    text = page(result)
    (given.out / "versus.md").write_text(text)
    print(text)
    return 0


def _installed(names: Sequence[str]) -> list[str]:
    found = []
    for package in dict.fromkeys(["dscheck", "torch", *(PACKAGES[name] for name in names)]):
        try:
            version(package)
        except PackageNotFoundError:
            continue
        found.append(package)
    return found


if __name__ == "__main__":
    sys.exit(main())
