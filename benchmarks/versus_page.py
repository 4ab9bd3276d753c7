"""The figures of benchmarks.versus as a page: rates, ratios, and which targets they reach."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.stall_targets import Target, at_least, at_most

OURS, RAW = "dscheck", "raw disk"
MOMENTS = {"returned": "save returned", "free": "tensors free to change", "durable": "durable"}
LEAST_OF_RAW = {"save": 0.95, "rows": 0.90, "columns": 0.80, "stages": 0.80, "fewer": 0.80, "more": 0.80}
READ_ONCE = 1.05

PAGE = """\
# Save, load and reshard {gb:.2f} GB on {ranks} ranks

`{command}`

{tensors} tensors: a GPT in fp32 with AdamW's moments, each cut by rows over the ranks. {machine}; {versions}.
Medians of {rounds} rounds after a first one, the slowest rank's seconds; every load compared bit for bit. Before each
load the caches were emptied ({evicted_by}); before each save but the first round's the page cache's memory was warmed.
Raw disk: the same bytes, {direct}, as many processes, each with as many threads and blocks as were fastest
(writes {write}, reads {read}), measured beside each contender in its rounds. dscheck / raw disk is the median of what
the rounds have side by side.

## GB/s

{speeds}

A save counts from its call until it is durable and committed. dscheck writes and checks a checksum a block.
Bytes that dscheck read for each byte wanted, over all ranks: {read_per_wanted}.
{notes}
## Targets

{targets}

## How long a save holds training up

In seconds: the first one, in memory as it was found, and the median of the later.

{blocked}

Here the tensors are to change as soon as `save` has returned: the worst case for dscheck, which copies them in the
background up to the optimizer's fence. In training the forward and backward passes lie between.

## The raw disk, by threads and block

{rates}
"""

Lines = list[dict[str, Any]]


def works(ranks: int) -> dict[str, str]:
    """What is timed, and what the page calls it."""
    return {
        "save": "save",
        "rows": "load, same cut",
        "columns": "load, rows → columns",
        "stages": "load, rows → layers",
        "fewer": f"load, {ranks} ranks → 1",
        "more": f"load, 1 rank → {ranks}",
    }


def seconds(lines: Lines, who: str, work: str) -> list[float]:
    """Of the counted rounds, in their order."""
    key = "durable" if work == "save" else "seconds"
    return [
        line[key] for line in lines if (line["who"], line["work"], line["first"]) == (who, work, False) and key in line
    ]


def of_raw(lines: Lines, work: str) -> float | None:
    """A contender's speed as a part of the raw disk's in the same rounds; None where it has none."""
    mine = seconds(lines, "contender", work)
    raw = seconds(lines, "raw", "rows" if work in ("columns", "stages") else work)
    return statistics.median(other / one for one, other in zip(mine, raw, strict=True)) if mine else None


def of_best_rival(result: dict[str, Any], work: str) -> tuple[float, str] | None:
    """dscheck's speed as a part of that of the fastest rival, and who that is."""
    medians = {
        name: statistics.median(taken)
        for name, lines in result["lines"].items()
        if (taken := seconds(lines, "contender", work))
    }
    ours = medians.pop(OURS, None)
    if ours is None or not medians:
        return None
    best = min(medians, key=medians.__getitem__)
    return medians[best] / ours, best


def targets(result: dict[str, Any]) -> Iterator[Target]:
    """One line for each target that the figures tell something of."""
    names = works(result["ranks"])
    for work, least in LEAST_OF_RAW.items():
        if (part := of_raw(result["lines"].get(OURS, []), work)) is not None:
            yield at_least(f"{names[work]}, of raw direct I/O", part, least)
    for work, name in names.items():
        if (ahead := of_best_rival(result, work)) is not None:
            yield at_least(f"{name}, of the fastest rival ({ahead[1]})", ahead[0], 1.0)
    if (shared := result.get("replicas")) is not None:
        what = f"{shared['replicas']} replicas load one state, bytes read of those wanted once"
        yield at_most(f"{what}, by the storage", shared["counted"] / shared["wanted"], READ_ONCE)
        yield at_most(f"{what}, by LoadReport", shared["told"] / shared["wanted"], READ_ONCE)


def page(result: dict[str, Any]) -> str:
    """All of it in Markdown. `result`: what benchmarks.versus writes as JSON."""
    facts, machine, raw = result["facts"], result["machine"], result["raw"]
    return PAGE.format(
        gb=facts["bytes"] / 1e9,
        ranks=result["ranks"],
        command=result["command"],
        tensors=facts["tensors"],
        machine=f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['disk']}",
        versions=", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        rounds=result["rounds"],
        evicted_by=facts["evicted_by"],
        direct="direct I/O" if facts["direct"] else "buffered, as the disk takes no direct I/O",
        write=raw["write"],
        read=raw["read"],
        speeds=_speeds(result),
        read_per_wanted=_read_per_wanted(result),
        notes=_notes(result["lines"]),
        targets=_table(Target._fields, [list(target) for target in targets(result)]),
        blocked=_blocked(result["lines"]),
        rates=_table(
            ["", "write, GB/s", "read, GB/s"],
            [[row["way"], f"{row['write'] / 1e9:.2f}", f"{row['read'] / 1e9:.2f}"] for row in raw["rates"]],
        ),
    )


def _speeds(result: dict[str, Any]) -> str:
    gb, lines = result["facts"]["bytes"] / 1e9, result["lines"]
    rows = []
    for work, title in works(result["ranks"]).items():
        raw = [one for each in lines.values() for one in seconds(each, "raw", _raw_work(work))]
        cells = [_rate(gb, raw), *(_cell(gb, each, work) for each in lines.values())]
        part, ahead = of_raw(lines.get(OURS, []), work), of_best_rival(result, work)
        rows.append([title, *cells, _ratio(part), _ratio(ahead and ahead[0])])
    return _table(["", RAW, *lines, "dscheck / raw disk", "dscheck / fastest rival"], rows)


def _raw_work(work: str) -> str:
    return "rows" if work in ("columns", "stages") else work


def _cell(gb: float, lines: Lines, work: str) -> str:
    failed = any(line["work"] == work and "failed" in line for line in lines)
    return "failed" if failed else _rate(gb, seconds(lines, "contender", work))


def _rate(gb: float, taken: list[float]) -> str:
    return f"{gb / statistics.median(taken):.2f}" if taken else "–"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _read_per_wanted(result: dict[str, Any]) -> str:
    read: dict[str, float] = {}
    for line in result["lines"].get(OURS, []):
        if "read_per_wanted" in line:
            read[line["work"]] = max(read.get(line["work"], 0.0), line["read_per_wanted"])
    names = works(result["ranks"])
    return ", ".join(f"{names[work]} {ratio:.3f}" for work, ratio in read.items()) or "not measured"


def _notes(lines: dict[str, Lines]) -> str:
    """What failed, and why, each once."""
    failed = {
        f"- {name}, {line['work']}: {line['failed']}": None
        for name, each in lines.items()
        for line in each
        if "failed" in line
    }
    return "\nFailed:\n\n" + "\n".join(failed) + "\n" if failed else ""


def _blocked(lines: dict[str, Lines]) -> str:
    rows = []
    for name, each in lines.items():
        saves = [line for line in each if (line["who"], line["work"]) == ("contender", "save") and "durable" in line]
        if len(saves) > 1:
            rows.append([name, *(_first_and_median(line[moment] for line in saves) for moment in MOMENTS)])
    return _table(["", *MOMENTS.values()], rows)


def _first_and_median(taken: Iterable[float]) -> str:
    first, *later = taken
    return f"{first:.3f}, {statistics.median(later):.3f}"


def _table(head: Iterable[str], rows: list[list[str]]) -> str:
    head = list(head)
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))
