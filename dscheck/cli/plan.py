"""`dscheck plan`: what each rank of another layout would read of a step, before any of its machines is there."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from dscheck.cli.step import open_step
from dscheck.cli.text import console, ranks, size, table
from dscheck.commit.contents import Contents
from dscheck.errors import ConfigError
from dscheck.layout.recipe import Override, Recipe, parse_degrees
from dscheck.load.forecast import Forecast, forecast
from dscheck.storage.base import Storage

LISTED = 5


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
    if gb_per_s is not None and not 0 < gb_per_s < math.inf:
        raise ConfigError(f"--gb-per-s {gb_per_s}: expected a rate above 0")
    degrees, overrides = parse_degrees(to), [Override.parse(cut) for cut in cuts]
    contents = open_step(root, step)
    recipe = Recipe.of(degrees, overrides, [row.name for row in contents.plan.tensors])
    rows = [
        _row(members, found, recipe.coordinate(members[0]), gb_per_s)
        for members, found in _forecasts(contents, recipe, only).items()
    ]
    unsure = sorted(recipe.unsure)
    if as_json:
        head = {"step": contents.record.step, "term": contents.record.term, "to": degrees, "ranks": recipe.ranks}
        print(json.dumps(head | {"on_every_stage": unsure, "rows": rows}, indent=2))
        return
    print(f"step {contents.record.step} on {recipe.ranks} ranks ({to}), cut by the rule of docs/plan.md")
    shown = table("", *rows[0], right=("wanted", "read", "files", "reads", "seconds"))
    for row in rows:
        shown.add_row(*(_cell(name, value) for name, value in row.items()))
    console().print(shown)
    total = sum(row["read"] * len(row["ranks"]) for row in rows)
    print(f"all ranks, each by itself: {size(total)}; the step has {size(contents.record.counts.bytes)}")
    if unsure:
        more = f" and {len(unsure) - LISTED} more" if len(unsure) > LISTED else ""
        print(
            f"counted on every stage, since their names have no number of a layer: {', '.join(unsure[:LISTED])}{more}. "
            "Say which stage has them with --cut 'PATTERN:pp=STAGE'"
        )


def _forecasts(contents: Contents, recipe: Recipe, only: Sequence[str]) -> dict[tuple[int, ...], Forecast]:
    """Ranks that would read alike, and what: replicas of a coordinate are looked at once."""
    known: dict[tuple[int, ...], Forecast] = {}
    alike: dict[tuple[tuple[int, ...], Forecast], list[int]] = defaultdict(list)
    rows = [
        (number, row)
        for number, row in enumerate(contents.plan.tensors)
        if not only or any(row.name == prefix or row.name.startswith(f"{prefix}.") for prefix in only)
    ]
    if not rows:
        raise ConfigError(f"--only {', '.join(only)}: step {contents.record.step} has no tensor of these names")
    for rank in range(recipe.ranks):
        at = recipe.coordinate(rank)
        key = tuple(place for axis, place in at.items() if axis != "dp")
        if key not in known:
            regions = ((number, recipe.regions(row.name, row.shape, at)) for number, row in rows)
            known[key] = forecast(contents, [(number, box) for number, boxes in regions for box in boxes])
        alike[key[:1], known[key]].append(rank)
    return {tuple(members): found for (_, found), members in alike.items()}


def _row(members: tuple[int, ...], found: Forecast, at: dict[str, int], gb_per_s: float | None) -> dict[str, Any]:
    numbers = asdict(found)
    row = {
        "ranks": list(members),
        "stage": at["pp"],
        "wanted": numbers["wanted_bytes"],
        "read": numbers["read_bytes"],
        "files": numbers["files"],
        "reads": numbers["reads"],
    }
    return row if gb_per_s is None else row | {"seconds": round(found.read_bytes / (gb_per_s * 1e9), 3)}


def _cell(name: str, value: Any) -> str:
    if name == "ranks":
        return ranks(tuple(value))
    return size(value) if name in ("wanted", "read") else str(value)
