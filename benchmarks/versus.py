"""dscheck against torch DCP and the raw disk: save, load and reshard one sharded state, in the same run.

python -m benchmarks.versus                 2 GB on 2 ranks, 3 rounds after a first that warms everything
python -m benchmarks.versus --gb 0.02 ...   the same, in seconds, for a look at whether it works
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.launch import REPOSITORY, run_ranks, trouble
from benchmarks.machine import describe, versions
from benchmarks.versus_page import page, ratios, summarize

RANKS = 2
RESULTS = REPOSITORY / "benchmarks" / "results"
# Keeps freed memory in the process: on a virtual machine the host takes it back, and touching it again costs more than
# the disk. The same for all contenders.
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
    "MALLOC_ARENA_MAX": "1",
}


class BenchmarkError(Exception):
    """The comparison cannot be made, or went wrong; says why."""


def measure(folder: Path, gb: float, rounds: int, *, drop_caches: bool) -> dict[str, Any]:
    """What the ranks measured below `folder`, where nothing is left. Raises BenchmarkError, TimeoutError, OSError."""
    nbytes = int(gb * 1e9)
    # One contender's step at a time, and room for what the file system frees late.
    needed, free = int(2.5 * nbytes), shutil.disk_usage(folder).free
    if free < needed:
        raise BenchmarkError(f"{free / 1e9:.1f} GB are free and {needed / 1e9:.1f} GB needed: choose another --dir")
    with tempfile.TemporaryDirectory(prefix="versus-", dir=folder) as inner:
        log = Path(inner) / "log.txt"
        arguments = [inner, nbytes, rounds, "drop" if drop_caches else "advise"]
        limit_s = 120 + (rounds + 1) * gb * 200
        status = run_ranks(RANKS, "benchmarks.versus_rank", arguments, log=log, timeout_s=limit_s, env=MALLOC)
        if status != 0:
            raise BenchmarkError(f"the ranks ended with status {status}:\n{trouble(log)}")
        measured: dict[str, Any] = json.loads((Path(inner) / "measured.json").read_text())
        return measured


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gb", type=float, default=2.0, help="size of the whole state, in 1e9 bytes")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds, after one that warms memory and caches")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of versus.json and versus.md")
    parser.add_argument("--keep-caches", action="store_true", help="evict our own files before loads, not all caches")
    given = parser.parse_args()
    try:
        measured = measure(given.dir, given.gb, given.rounds, drop_caches=not given.keep_caches)
    except (BenchmarkError, TimeoutError, OSError) as error:
        print(f"benchmarks.versus failed: {error}", file=sys.stderr)
        return 1
    summary = summarize(measured["rounds"])
    result = {
        "command": f"python -m benchmarks.versus --gb {given.gb:g} --rounds {given.rounds}",
        "machine": describe(given.dir),
        "versions": versions("dscheck", "torch"),
        "ranks": RANKS,
        "rounds": given.rounds,
        "facts": measured["facts"],
        "seconds": summary,
        "ratios": ratios(summary),
        "each_round": measured["rounds"],
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "versus.json").write_text(json.dumps(result, indent=1) + "\n")
    text = page(result)
    (given.out / "versus.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
