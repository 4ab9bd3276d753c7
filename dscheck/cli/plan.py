"""`dscheck plan`: what each rank of another layout would read of a step, before any of its machines is there."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import inf
from typing import Any

from dscheck.cli.step import open_step
from dscheck.cli.text import console, ranks, size, table, when
from dscheck.commit.contents import Contents
from dscheck.errors import ConfigError
from dscheck.layout.recipe import Override, Recipe, parse_degrees
from dscheck.load.forecast import Forecast, forecast
from dscheck.manifest.plan import TensorRow
from dscheck.storage import Storage, open_storage
from dscheck.tuning import tuned

LISTED = 5


@dataclass(frozen=True, slots=True)
class Pace:
    """What one rank reads in a second, and who says so."""

    bytes_s: float
    source: str


def show(
    root: str | Storage,
    step: int | None,
    to: str,
    cuts: Sequence[str],
    only: Sequence[str],
    gb_per_s: float | None,
    as_json: bool,
) -> None:
    """Print what the ranks would read, those alike together. Raises ConfigError for a layout that it cannot read."""
    if gb_per_s is not None and not 0 < gb_per_s < inf:
        raise ConfigError(f"--gb-per-s {gb_per_s}: expected a rate above 0")
    degrees, overrides = parse_degrees(to), [Override.parse(cut) for cut in cuts]
    storage = open_storage(root)
    contents = open_step(storage, step)
    tensors, pace = _chosen(contents, only), _pace(storage, gb_per_s)
    recipe = Recipe.of(degrees, overrides, [row.name for row in contents.plan.tensors])
    rows = [
        _row(members, found, recipe.coordinate(members[0]), pace)
        for members, found in _forecasts(contents, recipe, tensors).items()
    ]
    unsure, once = sorted(recipe.unsure), _once(contents, tensors)
    if as_json:
        head = {"step": contents.record.step, "term": contents.record.term, "to": degrees, "ranks": recipe.ranks}
        rate = None if pace is None else asdict(pace)
        print(json.dumps(head | {"on_every_stage": unsure, "once": once, "rate": rate, "rows": rows}, indent=2))
        return
    print(f"step {contents.record.step} on {recipe.ranks} ranks ({to}), cut by the rule of docs/plan.md")
    shown = table("", *rows[0], right=("wanted", "read", "files", "reads", "seconds"))
    for row in rows:
        shown.add_row(*(_cell(name, value) for name, value in row.items()))
    console().print(shown)
    print("\n".join(_below(sum(row["read"] * len(row["ranks"]) for row in rows), once, pace, unsure)))


def _below(read: int, once: int, pace: Pace | None, unsure: Sequence[str]) -> Iterator[str]:
    """What the table does not say: all ranks together, how long, and what the rule has not placed."""
    yield f"all ranks, each by itself: {size(read)}; in one process group, what several want once: {size(once)}"
    if pace is None:
        yield "how long: say what a rank reads with --gb-per-s, or let `dscheck probe` measure this root"
    else:
        yield f"seconds: of each rank by itself, at {size(pace.bytes_s)}/s, {pace.source}"
        yield f"one disk of that rate for all ranks, in one process group: {once / pace.bytes_s:.3g} s"
    if unsure:
        more = f" and {len(unsure) - LISTED} more" if len(unsure) > LISTED else ""
        yield (
            f"counted on every stage, since their names have no number of a layer: {', '.join(unsure[:LISTED])}{more}. "
            "Say which stage has them with --cut 'PATTERN:pp=STAGE'"
        )


def _pace(storage: Storage, gb_per_s: float | None) -> Pace | None:
    """As given, or as the probe of this root has reached it."""
    if gb_per_s is not None:
        return Pace(gb_per_s * 1e9, "as given by --gb-per-s")
    found = tuned(storage)
    if found is None:
        return None
    return Pace(found.load_bytes_s, f"as one process reached it in `dscheck probe` on {when(found.time)}")


def _chosen(contents: Contents, only: Sequence[str]) -> list[tuple[int, TensorRow]]:
    """The tensors at these names and below them, each with its number in the plan. Raises ConfigError for none."""
    rows = [
        (number, row)
        for number, row in enumerate(contents.plan.tensors)
        if not only or any(row.name == prefix or row.name.startswith(f"{prefix}.") for prefix in only)
    ]
    if only and not rows:
        raise ConfigError(f"--only {', '.join(only)}: step {contents.record.step} has no tensor of these names")
    return rows


def _once(contents: Contents, rows: Sequence[tuple[int, TensorRow]]) -> int:
    """What all data files hold, or the share that these tensors have of it."""
    chosen, every = sum(row.nbytes for _, row in rows), sum(row.nbytes for row in contents.plan.tensors)
    return sum(file.size for file in contents.files) * chosen // max(1, every)


def _forecasts(
    contents: Contents, recipe: Recipe, rows: Sequence[tuple[int, TensorRow]]
) -> dict[tuple[int, ...], Forecast]:
    """Ranks that would read alike, and what: replicas of a coordinate are looked at once."""
    known: dict[tuple[int, ...], Forecast] = {}
    alike: dict[tuple[tuple[int, ...], Forecast], list[int]] = defaultdict(list)
    for rank in range(recipe.ranks):
        at = recipe.coordinate(rank)
        key = tuple(place for axis, place in at.items() if axis != "dp")
        if key not in known:
            regions = ((number, recipe.regions(row.name, row.shape, at)) for number, row in rows)
            known[key] = forecast(contents, [(number, box) for number, boxes in regions for box in boxes])
        alike[key[:1], known[key]].append(rank)
    return {tuple(members): found for (_, found), members in alike.items()}


def _row(members: tuple[int, ...], found: Forecast, at: dict[str, int], pace: Pace | None) -> dict[str, Any]:
    numbers = asdict(found)
    row = {
        "ranks": list(members),
        "stage": at["pp"],
        "wanted": numbers["wanted_bytes"],
        "read": numbers["read_bytes"],
        "files": numbers["files"],
        "reads": numbers["reads"],
    }
    return row if pace is None else row | {"seconds": round(found.read_bytes / pace.bytes_s, 3)}


def _cell(name: str, value: Any) -> str:
    if name == "ranks":
        return ranks(tuple(value))
    return size(value) if name in ("wanted", "read") else str(value)
