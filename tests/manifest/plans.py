"""Random plans, right ones and ones with a single wrong value."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

from hypothesis import strategies as st

from dscheck.layout.region import Region
from dscheck.manifest.dtypes import ITEMSIZE
from dscheck.manifest.fragments import Fragment, Fragments
from dscheck.manifest.place import place
from dscheck.manifest.plan import Plan, RankRow, TensorRow

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
shapes = st.tuples(
    st.lists(st.sampled_from([0, 1, 2, 3, 5, 1 << 19]), max_size=1), st.lists(st.integers(0, 5), max_size=3)
).map(lambda parts: (*parts[0], *parts[1]))


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """A valid plan: tensors cut into slabs along one dimension, each written by one of its holders."""
    ranks = draw(st.integers(1, 4))
    names = draw(st.lists(texts, max_size=6, unique=True))
    aliased = draw(st.integers(0, len(names)))
    some_ranks = st.sets(st.integers(0, ranks - 1), min_size=1).map(lambda members: tuple(sorted(members)))
    holders = tuple(draw(st.lists(some_ranks, min_size=1, max_size=4)))
    block_bytes = draw(st.sampled_from([1, 7, 64, 1 << 18]))
    tensors = tuple(
        TensorRow(
            name,
            draw(st.sampled_from(sorted(ITEMSIZE))),
            draw(shapes),
            tuple(sorted(names[aliased:])) if i == 0 else (),
        )
        for i, name in enumerate(sorted(names[:aliased]))
    )
    rows = [(i, box) for i, tensor in enumerate(tensors) for box in draw(slabs(tensor.shape))]
    sizes = [box.numel * ITEMSIZE[tensors[i].dtype] for i, box in rows]
    held = [draw(st.integers(0, len(holders) - 1)) for _ in rows]
    writers = [draw(st.sampled_from(holders[h])) for h in held]
    at: dict[int, tuple[int, int]] = {}
    for writer in range(ranks):
        mine = draw(st.permutations([k for k, w in enumerate(writers) if w == writer]))
        offsets, first_blocks, _ = place([sizes[k] for k in mine], block_bytes)
        at |= dict(zip(mine, zip(offsets, first_blocks, strict=True), strict=True))
    fragments = Fragments.of(
        Fragment(i, box, writers[k], at[k][0], sizes[k], at[k][1], held[k]) for k, (i, box) in enumerate(rows)
    )
    mesh = draw(st.lists(texts, max_size=2, unique=True))
    rows_of_ranks = tuple(RankRow(rank, draw(texts), tuple((name, rank) for name in mesh)) for rank in range(ranks))
    return Plan(tensors, fragments, rows_of_ranks, holders, block_bytes)


@st.composite
def slabs(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Region]:
    """Non-empty boxes in ascending order that tile `shape`."""
    if 0 in shape:
        return []
    if not shape:
        return [Region((), ())]
    dim = draw(st.integers(0, len(shape) - 1))
    cuts = draw(st.sets(st.integers(1, shape[dim] - 1), max_size=3)) if shape[dim] > 1 else set()
    edges = [0, *sorted(cuts), shape[dim]]
    zeros = [0] * len(shape)
    return [
        Region((*zeros[:dim], a, *zeros[dim + 1 :]), (*shape[:dim], b, *shape[dim + 1 :])) for a, b in pairwise(edges)
    ]


@st.composite
def mutated(draw: st.DrawFn, plan: Plan) -> Plan:
    """`plan` with one value of one row changed, or with a row dropped, doubled or moved; it may still be valid."""
    table = draw(st.sampled_from(["tensors", "fragments", "fragments", "ranks", "holders", "block_bytes"]))
    if table == "block_bytes":
        return dataclasses.replace(plan, block_bytes=draw(st.sampled_from([0, -1, 1, 64, 2**30, 2**30 + 1])))
    rows = list(getattr(plan, table))
    if not rows:
        return plan
    at = draw(st.integers(0, len(rows) - 1))
    how = draw(st.sampled_from(["change", "change", "change", "drop", "double", "swap"]))
    if how == "change":
        rows[at] = draw(changed_row(rows[at]))
    elif how == "drop":
        del rows[at]
    elif how == "double":
        rows.insert(at, rows[at])
    else:
        rows[at], rows[-1] = rows[-1], rows[at]
    changed: Any = Fragments.of(rows) if table == "fragments" else tuple(rows)
    return dataclasses.replace(plan, **{table: changed})


@st.composite
def changed_row(draw: st.DrawFn, row: Any) -> Any:
    numbers = st.sampled_from([-1, 0, 1, 2, 3, 64, 100, 4096, 2**31, 2**63 - 64, 2**63 - 1, 2**63, 2**64])
    if isinstance(row, tuple):
        return tuple(draw(st.lists(numbers, max_size=3)))
    name = draw(st.sampled_from([field.name for field in dataclasses.fields(row)]))
    value: Any = getattr(row, name)
    if isinstance(value, int):
        bits = 31 if name in ("tensor", "writer", "holders") else 63 if isinstance(row, Fragment) else 65
        fitting = st.sampled_from([value + 1, value - 1, value + 64]) | numbers
        value = draw(fitting.filter(lambda number: -(2**bits) <= number < 2**bits))
    elif isinstance(value, str):
        value = draw(st.sampled_from(["", "a", value + "z", "int8"]))
    elif isinstance(value, Region):
        start = tuple(draw(st.lists(st.integers(0, 4), min_size=max(0, value.ndim - 1), max_size=value.ndim + 1)))
        value = Region(start, tuple(a + draw(st.integers(0, 3)) for a in start))
    elif name == "mesh":
        value = draw(st.sampled_from([(("dp", -1),), (("dp", 2**31),), (("dp", 0), ("dp", 1)), ()]))
    elif name == "aliases":
        value = tuple(draw(st.lists(texts, max_size=3)))
    else:
        value = tuple(draw(st.lists(numbers, max_size=4)))
    return dataclasses.replace(row, **{name: value})
