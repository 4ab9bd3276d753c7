"""The sections of the page of benchmarks.stall, each of which is empty where its rows are missing."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]

DRAIN = """\
## Steps while a save drains

{table}

Milliseconds on the device from the end of one step to the end of the next. A drain lasts from the moment at which the
device has done all it was given before `save()` until the last byte is in host memory and proved, here {drain:.0f} ms;
{saves} saves, one every {every} steps, into a storage that takes everything at once, so that nothing but the capture
and the checksums runs beside training. A step counts when it overlaps a drain in time. The first step of a drain holds
the copies on the device and the fence; the later ones run beside the copies to the host alone. The targets are for all
of them. All in all a save cost the loop {extra:.1f} ms in this run, in which the next one comes every {every} steps."""


def table(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def _causes(rows: dict[str, Row]) -> str:
    lines = []
    for name, row in rows.items():
        saves = row.get("saves")
        if not isinstance(saves, list):
            continue
        causes = {cause: [save["stall_ms"][cause] for save in saves] for cause in saves[0]["stall_ms"]}
        for cause, values in causes.items():
            lines.append([name, cause, f"{values[0]:.2f}", f"{statistics.median(values):.2f}", f"{max(values):.2f}"])
        for moment in ("captured_s", "committed_s"):
            seconds = [1e3 * (save[moment] or 0.0) for save in saves]
            lines.append(
                [
                    name,
                    f"until {moment[:-2]}",
                    f"{seconds[0]:.0f}",
                    f"{statistics.median(seconds):.0f}",
                    f"{max(seconds):.0f}",
                ]
            )
    if not lines:
        return ""
    return "## The stall by cause, ms\n\n" + table(["", "cause", "first", "median", "longest"], lines)


def _often(rows: dict[str, Row]) -> str:
    row = rows.get("every step", {})
    if "captured_gb_s" not in row:
        return ""
    stall = ", ".join(f"{cause} {milliseconds:.1f}" for cause, milliseconds in row["stall_ms"].items())
    return (
        f"## A save on every step\n\n{row['saves']} saves in a row, into a storage that takes everything at once: "
        f"{row['captured_gb_s']:.1f} GB/s captured, from the\n"
        f"first call until the last capture was over; a step took {row['step_ms']:.1f} ms, "
        f"without saves {row['plain_step_ms']:.1f}. All were committed.\n"
        f"Stall of a save on the CPU, ms: {stall}."
    )


def _drain(rows: dict[str, Row]) -> str:
    row = rows.get("drain", {})
    plain = row.get("plain")
    if not plain:
        return ""
    lines = []
    for name in ("plain", "overlapped", "first", "later"):
        spread = row[name]
        if spread:
            changes = [f"{100 * (spread[at] / plain[at] - 1):+.1f}%" for at in ("p50", "p99")]
            lines.append([name, str(spread["count"]), f"{spread['p50']:.2f}", f"{spread['p99']:.2f}", *changes])
    return DRAIN.format(
        table=table(["steps", "number", "p50", "p99", "p50 against plain", "p99 against plain"], lines),
        drain=row["drain_ms"]["p50"],
        **{name: row[name] for name in ("saves", "every")},
        extra=row["extra_ms"],
    )


def _memory(rows: dict[str, Row]) -> str:
    lines = []
    for name, row in rows.items():
        if "host_peak_bytes" in row:
            device = row["device_peak_bytes"]
            shown = "" if device is None else f"{device / (1 << 20):.0f}"
            budget = row["device_budget"]
            allowed = budget if isinstance(budget, str) else f"{budget >> 20}"
            region = row["saves"][0]["bytes"] >> 20
            lines.append([name, f"{row['host_peak_bytes'] >> 20}", f"{region}", shown, allowed])
    if not lines:
        return ""
    return (
        "## Memory, MiB\n\n"
        + table(["", "host, at most", "of it the capture region", "device, at most", "device budget"], lines)
        + "\n\nHost: the process's high-water mark less what it held before its Checkpointer was made, shared memory\n"
        "that it maps included. Device: what is in use outside torch's allocator round a save, less what was before."
    )


def _soak(rows: dict[str, Row]) -> str:
    runs = [row for row in rows.values() if row["part"] == "soak" and "committed" in row]
    if not runs:
        return ""
    lines = [
        [row["row"], str(row["saves"]), str(row["committed"]), str(len(row["damaged"])), str(len(row["different"]))]
        for row in runs
    ]
    return (
        f"## Soak\n\n{runs[0]['state_bytes'] / 1e9:.2f} GB of state, a save every 1 to 5 steps at random; each step\n"
        "was verified block by block, loaded into another job, and compared with a hash of every tensor, computed\n"
        "on the device from the state at its `save()`. *ring*: host memory for a quarter of the state.\n\n"
        + table(["", "saves", "committed", "damaged", "different"], lines)
    )


def _ranks(rows: dict[str, Row]) -> str:
    row = rows.get("ranks", {})
    if "ratio" not in row:
        return ""
    return (
        f"## {row['ranks']} GPUs\n\nAll-reduce of 256 MiB, {row['bus_gb_s']:.0f} GB/s a GPU without a save; within\n"
        f"captures ({row['operations_during']:.0f} all-reduces, {row['capture_bytes'] / 1e9:.1f} GB captured in "
        f"{row['capture_s']:.2f} s) {row['ratio']:.3f} of that, on the worst rank."
    )


def _errors(rows: dict[str, Row]) -> str:
    failed = [
        f"- {name}: {text}"
        for name, row in rows.items()
        for text in (row.get("error"), row.get("failed"), *row.get("errors", ())[:3])
        if text
    ]
    return "## What failed\n\n" + "\n".join(failed) if failed else ""


SECTIONS: tuple[Callable[[dict[str, Row]], str], ...] = (_causes, _often, _drain, _memory, _soak, _ranks, _errors)
