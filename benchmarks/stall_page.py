"""The rows of benchmarks.stall as a page."""

from __future__ import annotations

import statistics

from benchmarks.stall_sections import SECTIONS, Row, table
from benchmarks.stall_targets import targets

PAGE = """\
# What a save costs training

`{command}`

{device}; {machine}; {versions}.
{training}

{costs}

Each method has windows of {steps} steps with one save after the second step, between windows without a save: *extra* is
the time of the one less the mean of its neighbours, the device idle at both ends; the median, and the range of
{windows} windows (rivals: one or two). *until persisted* goes on with training until the save has ended, and counts
everything that the loop took longer by then. *persisted* is the time from the call to the end of the save; for the
prototypes, which persist nothing, to the last byte in host memory. Between windows the saved step is removed.
{limits}

## Targets

{targets}

{details}
"""


def page(result: Row) -> str:
    """All of it in Markdown. `result`: what benchmarks.stall writes as JSON."""
    rows = {row["row"]: row for row in result["rows"]}
    machine = result["machine"]
    parts = [section(rows) for section in SECTIONS]
    return PAGE.format(
        command=result["command"],
        device=result["device"],
        machine=f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['disk']}",
        versions=", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        training=_training(rows),
        costs=_costs(result["rows"]),
        steps=result["steps"],
        windows=result["windows"],
        limits=_limits(rows),
        targets=table(["what", "wanted", "measured", ""], [list(target) for target in targets(rows)]),
        details="\n\n".join(part for part in parts if part),
    )


def _training(rows: dict[str, Row]) -> str:
    if "training" not in rows:
        return ""
    job = rows["training"]
    return (
        f"A GPT of {job['parameters'] / 1e9:.2f} billion parameters in fp32, bf16 autocast, fused AdamW: "
        f"{job['tensors']} tensors, {job['state_bytes'] / 1e9:.2f} GB of state,\n"
        f"batch {job['batch']} x {job['length']}. "
        f"A step takes {job['step_ms']:.1f} ms: {job['forward_backward_ms']:.1f} forward and backward, "
        f"{job['optimizer_ms']:.1f} the optimizer."
    )


def _limits(rows: dict[str, Row]) -> str:
    machine = rows.get("machine", {})
    if "host_gb_s" not in machine:
        return ""
    return (
        f"\nThe device copies {machine['host_gb_s']:.1f} GB/s into page-locked host memory and "
        f"{machine['device_gb_s']:.0f} GB/s into its own (read once, written once)."
    )


def _costs(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        if "call_ms" in row and "step_ms" in row and isinstance(row.get("extra_ms"), list):
            step = row["step_ms"]
            extra = statistics.median(row["extra_ms"])
            lines.append(
                [
                    row["row"] + (f" (then failed: {row['failed']})" if "failed" in row else ""),
                    f"{statistics.median(row['call_ms']):.2f}",
                    f"{extra:.1f} ({min(row['extra_ms']):.1f} to {max(row['extra_ms']):.1f})",
                    f"{extra / step:.3f}",
                    f"{statistics.median(row['extra_until_persisted_ms']):.1f}",
                    f"{statistics.median(row['persisted_s']):.2f}",
                ]
            )
        elif row["part"] == "rivals":
            lines.append([row["row"], f"failed: {row['error'].splitlines()[0]}", "", "", "", ""])
    head = ["method", "save() call, ms", "extra, ms", "in steps", "until persisted, ms", "persisted after, s"]
    return table(head, lines)
