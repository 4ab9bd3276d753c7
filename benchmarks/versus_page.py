"""The figures of benchmarks.versus as ratios, and as a page."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

RAW, OURS, DCP = "raw disk", "dscheck", "torch DCP"
WORK = {"save": "save", "rows": "load, same cut", "columns": "load, rows → columns", "stages": "load, rows → layers"}
MOMENTS = {"returned": "save returned", "free": "tensors free to change", "durable": "durable"}

PAGE = """\
# Save, load and reshard {gb:.2f} GB on {ranks} ranks

`{command}`

{tensors} tensors: a GPT in fp32 with AdamW's moments, each cut by rows over the ranks. {machine}; {versions}.
Medians of {rounds} rounds after a first one, the slowest rank's seconds; every load compared bit for bit. Before each
load the caches were emptied ({evicted_by}); before each save but the first round's the page cache's memory was warmed.
Raw disk: the same bytes, {direct}, one process a rank and one chunk at a time: buffered reads, for which
the kernel reads ahead, can be faster.

{speeds}

A save counts from its call until it is durable and committed. dscheck writes and checks a checksum a block, DCP none.
Bytes that dscheck read for each byte wanted, on the worst rank: {read}.

How long a save holds training up, in seconds: the first one, in memory as it was found, and the median of the later.

{blocked}

Here the tensors are to change as soon as `save` has returned: the worst case for dscheck, which copies them in the
background up to the optimizer's fence. In training the forward and backward passes lie between.
"""


def summarize(rounds: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Seconds by contender, of saves by moment and of loads by layout: the first round's, and of the later ones."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for line in (line for lines in rounds for line in lines):
        by_name.setdefault(line["contender"], []).append(line)
    return {
        name: {
            "save": {moment: _spread(line["save"][moment] for line in lines) for moment in lines[0]["save"]},
            "loads": {
                layout: _spread(line["loads"][layout]["seconds"] for line in lines)
                | {"read_per_wanted": max(line["loads"][layout]["read_per_wanted"] for line in lines)}
                for layout in lines[0]["loads"]
            },
        }
        for name, lines in by_name.items()
    }


def _spread(seconds: Iterable[float]) -> dict[str, float]:
    first, *later = seconds
    return {"first": first, "median": statistics.median(later), "best": min(later), "worst": max(later)}


def median(summary: dict[str, Any], name: str, work: str) -> float:
    """Seconds that `name` took for one of WORK. The raw disk is read in its own order, whatever the layout."""
    if work == "save":
        return float(summary[name]["save"]["durable"]["median"])
    return float(summary[name]["loads"]["rows" if name == RAW else work]["median"])


def ratios(summary: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Speeds as parts of others', by WORK."""
    pairs = ((OURS, RAW), (DCP, RAW), (OURS, DCP))
    return {
        work: {f"{name} / {other}": median(summary, other, work) / median(summary, name, work) for name, other in pairs}
        for work in WORK
    }


def page(result: dict[str, Any]) -> str:
    """All of it in Markdown. `result`: what benchmarks.versus writes as JSON."""
    facts, machine, summary = result["facts"], result["machine"], result["seconds"]
    layouts = [work for work in WORK if work != "save"]
    read = (f"{WORK[work]} {summary[OURS]['loads'][work]['read_per_wanted']:.2f}" for work in layouts)
    return PAGE.format(
        gb=facts["bytes"] / 1e9,
        ranks=result["ranks"],
        command=result["command"],
        tensors=facts["tensors"],
        machine=f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['disk']}",
        versions=", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        rounds=result["rounds"],
        evicted_by=facts["evicted_by"],
        direct="O_DIRECT in chunks of 4 MiB" if facts["direct"] else "buffered, as the disk takes no direct I/O",
        speeds=_speeds(result),
        read=", ".join(read),
        blocked=_blocked(summary),
    )


def _speeds(result: dict[str, Any]) -> str:
    gb, names = result["facts"]["bytes"] / 1e9, (RAW, OURS, DCP)
    rows = [
        [title, *(f"{gb / median(result['seconds'], name, work):.2f}" for name in names)]
        + [f"{ratio:.2f}" for ratio in result["ratios"][work].values()]
        for work, title in WORK.items()
    ]
    return _table(["", *(f"{name}, GB/s" for name in names), *result["ratios"]["save"]], rows)


def _blocked(summary: dict[str, Any]) -> str:
    rows = [
        [name, *(f"{saves[moment]['first']:.3f}, {saves[moment]['median']:.3f}" for moment in MOMENTS)]
        for name, saves in ((name, contender["save"]) for name, contender in summary.items() if name != RAW)
    ]
    return _table(["", *MOMENTS.values()], sorted(rows))


def _table(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))
