"""What benchmarks.stall is to show, as numbers, and whether the rows show it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

Row = dict[str, Any]

SPARE, NONE = "dscheck", "dscheck, no device memory"
HOST_SLACK_BYTES = 256 << 20
# Streams, events and kernels that the driver loads late are no state of ours.
DEVICE_SLACK_BYTES = 32 << 20


class Target(NamedTuple):
    what: str
    wanted: str
    measured: str
    verdict: str


def at_most(what: str, value: float, bound: float, unit: str = "") -> Target:
    verdict = "reached" if value <= bound else "missed"
    return Target(what, f"at most {bound:.4g}{unit}", f"{value:.4g}{unit}", verdict)


def at_least(what: str, value: float, bound: float, unit: str = "") -> Target:
    verdict = "reached" if value >= bound else "missed"
    return Target(what, f"at least {bound:.4g}{unit}", f"{value:.4g}{unit}", verdict)


def targets(rows: dict[str, Row]) -> list[Target]:
    """One line for each target that the rows tell something of."""
    return [*_stall(rows), *_often(rows), *_memory(rows), *_soak(rows), *_ranks(rows)]


def _stall(rows: dict[str, Row]) -> Iterator[Target]:
    spare, none = rows.get(SPARE, {}), rows.get(NONE, {})
    if "extra_ms" in spare:
        extra = statistics.median(spare["extra_ms"]) / spare["step_ms"]
        yield at_most("extra a save, spare device memory", extra, 0.05, " steps")
    if "extra_ms" in none and (limit := _drain_limit_ms(rows)) is not None:
        yield at_most("extra a save, no device memory", statistics.median(none["extra_ms"]), 1.05 * limit, " ms")
    for name, row in ((SPARE, spare), (NONE, none)):
        if "extra_ms" in row:
            yield at_most(f"save() call, median, {name}", statistics.median(row["call_ms"]), 2.0, " ms")
            first, *later = row["extra_ms"]
            # Where later saves cost nothing, a millisecond is what the first may cost thrice.
            allowed = 3 * max(1.0, statistics.median(later or [first]))
            yield at_most(f"first save's extra, {name}", first, allowed, " ms")


def _drain_limit_ms(rows: dict[str, Row]) -> float | None:
    """What the bus needs for the state beyond the forward and backward passes."""
    job, machine = rows.get("training", {}), rows.get("machine", {})
    if "state_bytes" not in job or "host_gb_s" not in machine:
        return None
    copy_ms: float = job["state_bytes"] / machine["host_gb_s"] / 1e6
    return max(0.0, copy_ms - float(job["forward_backward_ms"]))


def _often(rows: dict[str, Row]) -> Iterator[Target]:
    often, drain = rows.get("every step", {}), rows.get("drain", {})
    bus = rows.get("bus", {}).get("host_gb_s") or rows.get("machine", {}).get("host_gb_s")
    if "captured_gb_s" in often and bus:
        yield at_least("save on every step, of the bus's rate", often["captured_gb_s"] / bus, 0.95)
    if drain.get("overlapped") and drain.get("plain"):
        for at, bound in (("p50", 1.02), ("p99", 1.05)):
            ratio = drain["overlapped"][at] / drain["plain"][at]
            yield at_most(f"step while a save drains, {at}, of one without", ratio, bound)


def _memory(rows: dict[str, Row]) -> Iterator[Target]:
    for name, row in rows.items():
        if "host_peak_bytes" not in row:
            continue
        region = row["saves"][0]["bytes"]
        yield at_most(f"host memory, {name}", row["host_peak_bytes"] / 1e9, (region + HOST_SLACK_BYTES) / 1e9, " GB")
        if row["device_peak_bytes"] is not None and isinstance(row["device_budget"], int):
            bound = row["device_budget"] + DEVICE_SLACK_BYTES
            yield at_most(f"device memory, {name}", row["device_peak_bytes"] / 1e9, bound / 1e9, " GB")


def _soak(rows: dict[str, Row]) -> Iterator[Target]:
    runs = [row for row in rows.values() if row["part"] == "soak" and "committed" in row]
    if runs:
        saves = sum(row["saves"] for row in runs)
        good = sum(row["committed"] - len(row["different"]) for row in runs) - sum(len(row["damaged"]) for row in runs)
        yield at_least("soak: saves committed, verified and equal to their moment", good, saves)


def _ranks(rows: dict[str, Row]) -> Iterator[Target]:
    if "ratio" in rows.get("ranks", {}):
        yield at_least("all-reduce bandwidth under a capture, of that without", rows["ranks"]["ratio"], 0.95)
