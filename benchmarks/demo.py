"""`make demo`: train, save, kill a rank in the middle of a save, and go on in three layouts with the same losses.

Exits with 1, and says what does not agree, unless the resumed runs' losses equal the uninterrupted run's: bit for bit
in the same layout, within TOLERANCE in another.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.journal import read_journal
from benchmarks.launch import run_ranks, trouble
from dscheck.commit import read_history
from dscheck.storage import Storage, open_storage
from dscheck.storage.base import LocalFiles

STEPS = 24
SAVE_EVERY = 4
KILL_STEP = 16
KILL_RANK = 2
RESUMED = KILL_STEP - SAVE_EVERY
TOLERANCE = 1e-3
TIMEOUT_S = 300.0


class Disagreement(Exception):
    """The demo did not show what it is there to show."""


@dataclass(frozen=True, slots=True)
class Run:
    """One launch of the training script: on how many ranks, `tp` of which share each layer."""

    name: str
    title: str
    ranks: int
    tp: int
    same_layout: bool = True


WHOLE = Run("uninterrupted", "uninterrupted\n4 ranks\nFSDP 2 x TP 2", 4, 2)
KILLED = Run("killed", "killed\n4 ranks\nFSDP 2 x TP 2", 4, 2)
RESUMES = (
    Run("resumed-4", "resumed\n4 ranks\nFSDP 2 x TP 2", 4, 2),
    Run("resumed-2", "resumed\n2 ranks\nFSDP 2", 2, 1, same_layout=False),
    Run("resumed-1", "resumed\n1 rank\nnot cut", 1, 1, same_layout=False),
)


class Demo:
    """The runs: journals and logs below one folder, and roots below `roots`, a URL, or there as well."""

    def __init__(self, folder: Path, console: Console, roots: str | None = None) -> None:
        self.folder, self.console, self.roots = folder, console, roots
        self.began = time.monotonic()

    def root(self, run: Run) -> str:
        return f"{self.roots.rstrip('/')}/{run.name}" if self.roots else str(self.folder / run.name / "root")

    def lines(self, run: Run, kind: str) -> list[list[dict[str, Any]]]:
        """What the ranks of `run` wrote down, a list a rank."""
        return [read_journal(self.folder / run.name / f"rank-{rank}.jsonl", kind) for rank in range(run.ranks)]

    def losses(self, run: Run) -> dict[int, float]:
        return {line["step"]: line["loss"] for line in self.lines(run, "step")[0]}

    def say(self, text: str) -> None:
        self.console.print(f"[dim]{time.monotonic() - self.began:5.0f} s[/dim]  {text}", soft_wrap=True)

    def launch(self, run: Run, *, save_every: int = SAVE_EVERY, killed: bool = False) -> Path:
        """Run it to its end, which must be a good one, unless it is to be killed; its log."""
        folder = self.folder / run.name
        folder.mkdir(exist_ok=True)
        log = folder / "log.txt"
        module, prefix = ("benchmarks.demo_killed", [KILL_RANK, KILL_STEP]) if killed else ("benchmarks.demo_train", [])
        options = ["--steps", STEPS, "--save-every", save_every, "--tp", run.tp, "--journal", folder]
        arguments = [*prefix, self.root(run), *options]
        status = run_ranks(run.ranks, module, arguments, log=log, timeout_s=TIMEOUT_S)
        if (status != 0) != killed:
            raise Disagreement(f"the {run.name} run ended with status {status}:\n{trouble(log)}")
        return log

    def train_whole(self) -> None:
        self.say(f"{STEPS} steps on 4 ranks, FSDP 2 x TP 2, nothing saved: what the others are measured against")
        self.launch(WHOLE, save_every=0)

    def train_and_kill(self) -> None:
        self.say(
            f"the same with a save every {SAVE_EVERY} steps; rank {KILL_RANK} will kill itself in that of {KILL_STEP}"
        )
        log = self.launch(KILLED, killed=True)
        if "SIGKILL" not in log.read_text(errors="replace"):
            raise Disagreement(f"rank {KILL_RANK} did not die of SIGKILL:\n{trouble(log)}")
        storage = open_storage(self.root(KILLED))
        sizes = {entry.key: entry.size for entry in storage.list("steps/")}
        whole, torn = (
            next(
                (size for key, size in sizes.items() if re.fullmatch(rf"steps/{step}/\d+/data-{KILL_RANK}.bin", key)), 0
            )
            for step in (RESUMED, KILL_STEP)
        )
        # An object store shows nothing of an object that is not finished.
        if not (torn > 0 if isinstance(storage, LocalFiles) else torn == 0) or torn >= whole:
            raise Disagreement(f"rank {KILL_RANK} was to die in its data file: {torn} bytes of {whole} are there")
        newest = read_history(storage).newest
        if newest is None or newest.step != RESUMED:
            raise Disagreement(f"the newest step after the kill is {newest}, not {RESUMED}")
        self.say(f"rank {KILL_RANK} died with {torn:,} of {whole:,} bytes to be seen; the newest step is {RESUMED}")

    def resume(self, run: Run) -> None:
        copy_root(open_storage(self.root(KILLED)), open_storage(self.root(run)))
        self.launch(run)
        reports = [line for lines in self.lines(run, "load") for line in lines]
        if [report.get("step") for report in reports] != [RESUMED] * run.ranks:
            raise Disagreement(f"the {run.name} run was to load step {RESUMED} on {run.ranks} ranks: {reports}")
        seconds = max(report["seconds"] for report in reports)
        newest = read_history(open_storage(self.root(run))).newest
        if newest is None or newest.step != STEPS:
            raise Disagreement(f"the newest step of the {run.name} run is {newest}, not {STEPS}")
        layout = run.title.replace("\n", ", ").removeprefix("resumed, ")
        self.say(f"{layout}: loaded step {RESUMED} in {seconds:.2f} s (RNG {reports[0]['rng']}), trained to {STEPS}")


def copy_root(source: Storage, target: Storage) -> None:
    """Everything that lies in `source`, torn data files included."""
    for entry in source.list(""):
        writer = target.create(entry.key)
        writer.write(source.read(entry.key))
        writer.commit()


def difference(of: dict[int, float], against: dict[int, float]) -> float:
    """The largest relative difference over the steps that `of` has."""
    return max((abs(loss - against[step]) / abs(against[step]) for step, loss in of.items()), default=0.0)


def check(demo: Demo) -> None:
    """Raises Disagreement unless every loss is what it should be."""
    whole = demo.losses(WHOLE)
    wanted = {WHOLE: range(1, STEPS + 1), KILLED: range(1, KILL_STEP)} | {
        run: range(RESUMED + 1, STEPS + 1) for run in RESUMES
    }
    for run, steps in wanted.items():
        losses = demo.losses(run)
        if missing := [step for step in steps if step not in losses]:
            raise Disagreement(f"the {run.name} run has no loss of steps {missing}")
        limit = 0.0 if run.same_layout else TOLERANCE
        if (worst := difference(losses, whole)) > limit:
            first = next(step for step, loss in losses.items() if loss != whole[step])
            expected = "equal bit for bit" if limit == 0 else f"within {limit:g}"
            raise Disagreement(
                f"the {run.name} run's losses differ from the uninterrupted ones by a relative {worst:.1e}, from step "
                f"{first} on; expected {expected}"
            )


def loss_table(demo: Demo) -> Table:
    table = Table(title="Loss, step by step", caption="= bit for bit that of the uninterrupted run")
    table.add_column("step", justify="right")
    runs = (WHOLE, KILLED, *RESUMES)
    for run in runs:
        table.add_column(run.title, justify="right")
    losses = [demo.losses(run) for run in runs]
    for step in range(1, STEPS + 1):
        cells = [
            _cell(of.get(step), losses[0][step], same=run is not WHOLE) for run, of in zip(runs, losses, strict=True)
        ]
        table.add_row(str(step), *cells, end_section=step in (RESUMED, STEPS))
    worst = [difference(of, losses[0]) for of in losses[1:]]
    table.add_row("", "largest difference, relative", *("none" if value == 0 else f"{value:.1e}" for value in worst))
    return table


def _cell(loss: float | None, against: float, *, same: bool) -> str:
    if loss is None:
        return ""
    return f"{loss:.7f} " + ("=" if same and loss == against else " ")


def save_table(demo: Demo) -> Table:
    step_ms = 1e3 * statistics.median(line["seconds"] for line in demo.lines(WHOLE, "step")[0])
    table = Table(
        title="What each save cost the loop",
        caption=f"the worst rank's figures; bytes of all ranks. A step without a save takes {step_ms:.0f} ms (median)",
    )
    for name in ("run", "step", "save() call, ms", "fence stall, ms", "all stalls, ms", "bytes", "committed after, s"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for run in (KILLED, *RESUMES):
        by_step: dict[int, list[dict[str, Any]]] = {}
        for line in (line for lines in demo.lines(run, "save") for line in lines):
            by_step.setdefault(line["step"], []).append(line)
        for step, saves in by_step.items():
            table.add_row(run.name, str(step), *_costs(saves), end_section=step == max(by_step))
    return table


def _costs(saves: list[dict[str, Any]]) -> list[str]:
    if errors := [save["error"] for save in saves if save["error"]]:
        return [f"failed: {errors[0]}"]
    call, fence = (max(save["stall_s"][cause] for save in saves) for cause in ("call", "fence"))
    stall = max(sum(save["stall_s"].values()) for save in saves)
    committed = max(save["committed_s"] for save in saves)
    times = [f"{1e3 * seconds:.1f}" for seconds in (call, fence, stall)]
    return [*times, f"{sum(save['bytes'] for save in saves):,}", f"{committed:.2f}"]


def show_ls(demo: Demo, run: Run) -> None:
    command = [sys.executable, "-c", "from dscheck.cli import main; main()", "ls", demo.root(run)]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if shown.returncode != 0:
        raise Disagreement(f"dscheck ls ended with status {shown.returncode}:\n{shown.stdout}{shown.stderr}")
    demo.console.print(f"\n[bold]$ dscheck ls {demo.root(run)}[/bold]")
    demo.console.print(shown.stdout.rstrip(), markup=False, soft_wrap=True)


def show(folder: Path, console: Console, roots: str | None = None) -> None:
    """Run it all below `folder` and print the tables. Raises Disagreement and TimeoutError."""
    demo = Demo(folder, console, roots)
    demo.train_whole()
    demo.train_and_kill()
    for run in RESUMES:
        demo.resume(run)
    check(demo)
    console.print()
    console.print(loss_table(demo), save_table(demo), sep="\n\n")
    show_ls(demo, RESUMES[0])
    worst = max(difference(demo.losses(run), demo.losses(WHOLE)) for run in RESUMES)
    demo.say(
        f"All losses agree: bit for bit in the same layout, within a relative {worst:.1e} in the others "
        f"({TOLERANCE:g} is allowed)."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="a new folder for roots, journals and logs, to be kept"
    )
    parser.add_argument(
        "--root", metavar="URL", help="where the roots lie, such as s3://bucket/demo: nothing may lie there yet"
    )
    given = parser.parse_args()
    if given.root and next(open_storage(given.root).list(""), None) is not None:
        parser.error(f"--root {given.root}: something lies there; name another place")
    if given.keep is not None and given.keep.exists():
        parser.error(f"--keep {given.keep}: it exists; name a new folder")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    try:
        if given.keep is not None:
            given.keep.mkdir(parents=True)
            show(given.keep, console, given.root)
        else:
            with tempfile.TemporaryDirectory(prefix="dscheck-demo-") as folder:
                show(Path(folder), console, given.root)
    except (Disagreement, TimeoutError) as error:
        console.print(f"\nThe demo failed: {error}", style="bold red", markup=False, soft_wrap=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
