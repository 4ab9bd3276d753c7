"""The page of benchmarks/scale.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from benchmarks.stall_targets import Target, at_most


def page(result: dict[str, Any]) -> str:
    """Markdown: what is saved, what is loaded, who arrives, and on which machine."""
    machine, software = result["machine"], result["versions"]
    plans, commits = result["curve"] + result["saved"], result["commits"]
    return "\n".join(
        [
            "# Planning at scale",
            "",
            f"`{result['command']}`",
            "",
            "405 B parameters (126 layers of width 16,384) in bf16, fp32 master weights and two moments; or a mixture",
            "of 256 experts a layer. No data. Seconds are CPU seconds of one core, while others worked on the machine:",
            f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB; {_joined(software)}.",
            f"Measured at commit {commits['saved']}, the first job on fewer ranks at {commits['curve']},",
            f"and arrival and commit at {commits['store']}.",
            "",
            "## What the coordinator does at a first save",
            "",
            *_table(
                (
                    "saved by",
                    "ranks",
                    "tensors",
                    "fragments",
                    "merge, s",
                    "proof, s",
                    "rules, s",
                    "encode, s",
                    "peak, GB",
                ),
                [
                    (
                        plan["title"],
                        f"{plan['ranks']:,}",
                        f"{plan['tensors']:,}",
                        f"{plan['fragments']:,}",
                        *(f"{plan[name]:.2f}" for name in ("merge_s", "proof_s", "validate_s", "encode_s")),
                        f"{plan['peak_bytes'] / 1e9:.2f}",
                    )
                    for plan in plans
                ],
            ),
            "",
            "`peak` is that of the process, with the claims of all ranks, the plan and its encoding.",
            "",
            "## What it stores, and what reaches it",
            "",
            *_table(
                (
                    "saved by",
                    "plan, MB",
                    "bytes a fragment",
                    "head, MB",
                    "first message, kB",
                    "all first, MB",
                    "steady, B",
                ),
                [
                    (
                        plan["title"],
                        f"{plan['plan_bytes'] / 1e6:.1f}",
                        f"{plan['plan_bytes'] / plan['fragments']:.2f}",
                        f"{plan['head_bytes'] / 1e6:.2f}",
                        f"{plan['claims_message_bytes'] / 1e3:.1f}",
                        f"{plan['claims_message_bytes'] * plan['ranks'] / 1e6:.1f}",
                        f"{plan['steady_message_bytes']}",
                    )
                    for plan in plans
                ],
            ),
            "",
            "`first` and `steady` are a rank's message at a first save and at later ones, without samples, of which it",
            "sends 8 bytes a region at a first save.",
            f"A rank makes its own in {_most(plans, 'claims_encode_s')} ms,",
            f"and the coordinator reads each in {_most(plans, 'claims_decode_s')} ms.",
            "",
            "## What one rank does before it reads the first tensor",
            "",
            *_table(
                (
                    "saved by",
                    "loaded by",
                    "regions",
                    "boxes",
                    "reads",
                    "open, s",
                    "plan, s",
                    "reads, s",
                    "index, MB",
                    "peak, MB",
                    "index of all nodes, GB",
                ),
                [
                    (
                        plan["title"],
                        load["title"],
                        f"{load['wanted']:,}",
                        f"{load['needs']:,}",
                        f"{load['reads']:,}",
                        *(f"{load[name]:.2f}" for name in ("open_s", "plan_s", "reads_s")),
                        f"{load['index_bytes'] / 1e6:.1f}",
                        f"{load['peak_bytes'] / 1e6:.0f}",
                        f"{load['all_index_bytes'] / 1e9:.1f}",
                    )
                    for plan in result["saved"]
                    for load in plan["loads"]
                ],
            ),
            "",
            "The plan lies in the page cache. `index of all nodes`: the head and each needed batch once a node of 8",
            "ranks, as they read it, from four nodes.",
            "",
            "## Arrival and commit over one store",
            "",
            "Ranks are threads of one process with own connections; seconds on the wall, steady: the median of three.",
            "",
            *_table(
                (
                    "ranks",
                    "first save, s",
                    "steady save, s",
                    "coordinator, steady, ms",
                    "messages a save",
                    "steady, kB in",
                ),
                [
                    (
                        f"{row['ranks']:,}",
                        f"{row['first']['seconds']:.2f}",
                        f"{row['steady']['seconds']:.2f}",
                        f"{(row['steady']['decide_plan_s'] + row['steady']['decide_arrive_s']) * 1e3:.1f}",
                        f"{row['messages_a_save']:,}",
                        f"{(row['steady']['plan_bytes'] + row['steady']['arrive_bytes']) / 1e3:.1f}",
                    )
                    for row in result["store"]
                ],
            ),
            "",
            "## Targets",
            "",
            *_table(Target._fields, targets(result)),
            "",
        ]
    )


def targets(result: dict[str, Any]) -> Iterator[Target]:
    """The most that any layout takes, of what a rank, the coordinator and the storage may."""
    plans = result["curve"] + result["saved"]
    loads = [load for plan in result["saved"] for load in plan["loads"]]
    planned = [load["open_s"] + load["plan_s"] + load["reads_s"] for load in loads]
    steady = [
        (row["steady"]["decide_plan_s"] + row["steady"]["decide_arrive_s"]) / row["ranks"] for row in result["store"]
    ]
    yield at_most("one rank's load plan", max(planned), 1, " s")
    yield at_most("peak memory of planning a load", max(load["peak_bytes"] for load in loads) / 1e9, 1, " GB")
    yield at_most(
        "stored of a plan", max(plan["plan_bytes"] / plan["fragments"] for plan in plans), 16, " B a fragment"
    )
    yield at_most("proof that fragments tile", max(plan["proof_s"] for plan in plans), 10, " s")
    yield at_most("coordinator, steady save", max(steady) * 1e3, 1, " ms a rank")


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [columns, ("---", *("---:" for _ in columns[1:])), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _most(plans: Sequence[dict[str, Any]], name: str) -> str:
    return f"{max(plan[name] for plan in plans) * 1e3:.1f}"


def _joined(software: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in software.items())
