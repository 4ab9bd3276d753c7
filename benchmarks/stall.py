"""What a save costs training: dscheck, what users would pick instead, and what the hardware allows, in one run.

python -m benchmarks.stall                        all parts on one GPU, 1.3 B parameters, saved to /dev/shm
python -m benchmarks.stall --parts limits,ours    some of them: limits, ours, often, soak, rivals
python -m benchmarks.stall --gpus 2               also all-reduces under a capture, one process a GPU
python -m benchmarks.stall --device cpu --tiny    whether it works, in a minute
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

from benchmarks.launch import REPOSITORY, run_ranks, trouble
from benchmarks.machine import describe, versions
from benchmarks.stall_bench import Options
from benchmarks.stall_page import page

PARTS = ("limits", "ours", "often", "soak", "rivals")
RESULTS = REPOSITORY / "benchmarks" / "results"
STATE_BYTES = 15_800_000_000
# A step that is being written while the one before it is not removed yet.
ROOM_BYTES = 2 * STATE_BYTES
RANK_BYTES = 8 << 30
# Less is captured before an all-reduce begins.
TINY_RANK_BYTES = 256 << 20


class Run:
    """Parts one after the other, each in a process of its own, and their rows."""

    def __init__(self, given: argparse.Namespace, work: Path) -> None:
        self.given, self.work = given, work
        self.began = time.monotonic()
        self.batch = given.batch
        self.rows: list[dict[str, Any]] = []

    def options(self) -> Options:
        given = self.given
        trace = str(given.trace.resolve()) if given.trace else None
        windows, steps, saves = (2, 4, 8) if given.tiny else (given.windows, given.steps, given.saves)
        return Options(given.device, given.tiny, self.batch, windows, steps, saves, str(self.work), trace, self.began)

    def part(self, name: str) -> None:
        """Its rows are in `rows`, and how it ended unless well; nothing of it runs on."""
        command = [sys.executable, "-m", "benchmarks.stall_part", name, self.options().to_json()]
        process = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True)
        try:
            status: object = process.wait(self.given.limit_s)
        except subprocess.TimeoutExpired:
            status = f"nothing within {self.given.limit_s:.0f} s"
        finally:
            # With what it had started itself: a rival's writer process, say.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        path = self.work / f"{name}.jsonl"
        self.rows += [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        if status != 0:
            self.rows.append({"part": name, "row": f"part {name}", "error": f"its process ended with {status}"})
        training = next((row for row in self.rows if row["row"] == "training"), None)
        self.batch = training["batch"] if training else self.batch

    def ranks(self) -> None:
        log = self.work / "ranks.txt"
        nbytes = TINY_RANK_BYTES if self.given.tiny else RANK_BYTES
        arguments = (self.work, self.given.device, nbytes)
        row: dict[str, Any] = {"part": "ranks", "row": "ranks"}
        try:
            status = run_ranks(
                self.given.gpus, "benchmarks.stall_ranks", arguments, log=log, timeout_s=self.given.limit_s
            )
            row |= json.loads((self.work / "ranks.json").read_text()) if status == 0 else {"error": trouble(log)}
        except TimeoutError as error:
            row["error"] = str(error)
        if "error" in row:
            print(row["error"], file=sys.stderr)
            row["error"] = row["error"].replace(str(self.work), "DIR")[-300:]
        self.rows.append(row)

    def result(self) -> dict[str, Any]:
        given = self.given
        return {
            "command": "python -m benchmarks.stall" + "".join(f" {word}" for word in given.shown),
            "machine": describe(given.dir),
            # Asked by the parts: a driver's context in this process would show in what they measure.
            "device": next((row["device"] for row in self.rows if "device" in row), given.device),
            "versions": versions("dscheck", "torch") | _optional("torch_checkpointing"),
            "windows": self.options().windows,
            "steps": self.options().steps,
            "seconds": time.monotonic() - self.began,
            "rows": self.rows,
        }

    def write(self) -> str:
        """What is known so far, as JSON and as a page."""
        self.given.out.mkdir(parents=True, exist_ok=True)
        result = self.result()
        (self.given.out / "stall.json").write_text(json.dumps(result, indent=1) + "\n")
        text = page(result)
        (self.given.out / "stall.md").write_text(text)
        return text


def _optional(package: str) -> dict[str, str]:
    try:
        return {package: versions(package)[package]}
    except PackageNotFoundError:
        return {}


def refuse_little_room(given: argparse.Namespace) -> None:
    free = shutil.disk_usage(given.dir).free
    if not given.tiny and free < ROOM_BYTES:
        raise SystemExit(
            f"{given.dir} has {free / 1e9:.1f} GB free, {ROOM_BYTES / 1e9:.1f} GB are needed: choose another --dir, or "
            f"enlarge it (mount -o remount,size=64g {given.dir})"
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="of limits, ours, often, soak, rivals")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="shapes that take seconds on a CPU")
    parser.add_argument("--batch", type=int, default=0, help="sequences a step; 0: a step lasts about 160 ms")
    parser.add_argument("--windows", type=int, default=3, help="windows with a save, of each method but the rivals")
    parser.add_argument("--steps", type=int, default=10, help="steps from save to save")
    parser.add_argument("--saves", type=int, default=100, help="saves of the soak")
    parser.add_argument("--gpus", type=int, default=1, help="2: also all-reduces under a capture")
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"), help="where saves go, for a while")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of stall.json and stall.md")
    parser.add_argument("--trace", type=Path, help="folder for the trace of one save of each kind")
    parser.add_argument("--limit-s", type=float, default=240.0, help="a part that takes longer is ended")
    given = parser.parse_args()
    given.parts = [part for part in given.parts.split(",") if part]
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    hidden = {"--dir", "--out", "--trace"}
    words = sys.argv[1:]
    given.shown = [word for at, word in enumerate(words) if not ({word, *words[at - 1 : at]} & hidden)]
    return given


def main() -> int:
    given = arguments()
    refuse_little_room(given)
    with tempfile.TemporaryDirectory(prefix="stall-", dir=given.dir) as work:
        run = Run(given, Path(work))
        for name in given.parts:
            run.part(name)
            run.write()
        if given.gpus > 1:
            run.ranks()
        print(run.write())
    return 1 if any(("error" in row or "failed" in row) and row["part"] != "rivals" for row in run.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
