"""load(save(x)) equals slicing the whole, bit for bit, whatever cut x was saved in and is wanted in."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from dscheck import DscheckError, sharded
from dscheck.commit import put_plan, read_history
from dscheck.commit.contents import Contents
from dscheck.manifest.arrow import encode_plan
from dscheck.manifest.fragments import Fragment, Fragments
from dscheck.manifest.keys import record_key
from dscheck.manifest.place import block_count
from dscheck.storage import Storage
from tests.end_to_end.worlds import fresh, load, random_bits, same_bits, save

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex128, torch.uint16]


@dataclass(frozen=True)
class Box:
    start: tuple[int, ...]
    stop: tuple[int, ...]

    def of(self, full: torch.Tensor) -> torch.Tensor:
        return full[tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True))] if full.ndim else full


@dataclass(frozen=True)
class Range:
    start: int
    stop: int

    def of(self, full: torch.Tensor) -> torch.Tensor:
        return full.reshape(-1)[self.start : self.stop]


Piece = Box | Range


def _points(draw: Any, length: int, parts: int) -> list[int]:
    inner = sorted(draw(st.lists(st.integers(0, length), min_size=parts - 1, max_size=parts - 1)))
    return [0, *inner, length]


def _boxes(draw: Any, shape: tuple[int, ...], ranks: int) -> list[Piece]:
    """An uneven grid with at most as many cells as ranks; cells may be empty."""
    cells: list[tuple[tuple[int, int], ...]] = [()]
    for length in shape:
        parts = draw(st.integers(1, max(1, ranks // len(cells))))
        points = _points(draw, length, parts)
        cells = [(*cell, pair) for cell in cells for pair in itertools.pairwise(points)]
    return [Box(tuple(a for a, _ in cell), tuple(b for _, b in cell)) for cell in cells]


@st.composite
def cuts(draw: Any, shape: tuple[int, ...], ranks: int) -> list[Piece | None]:
    """For each rank a piece of a tensor, so that together they tile it; some held twice, some ranks without any."""
    if draw(st.booleans()):
        pieces = _boxes(draw, shape, ranks)
    else:
        points = _points(draw, int(torch.Size(shape).numel()), draw(st.integers(1, ranks)))
        pieces = [Range(a, b) for a, b in itertools.pairwise(points)]
    spare = ranks - len(pieces)
    extra = draw(st.lists(st.sampled_from([*pieces, None]), min_size=spare, max_size=spare))
    return draw(st.permutations([*pieces, *extra]))


@dataclass(frozen=True)
class Case:
    tensors: list[torch.Tensor]
    source: list[list[Piece | None]]
    target: list[list[Piece | None]]


@st.composite
def cases(draw: Any) -> Case:
    before, after = draw(st.integers(1, 16)), draw(st.integers(1, 16))
    tensors, source, target = [], [], []
    for number in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(0, 9), max_size=4)))
        tensors.append(random_bits(shape, draw(st.sampled_from(DTYPES)), number))
        source.append(draw(cuts(shape, before)))
        target.append(draw(cuts(shape, after)))
    return Case(tensors, source, target)


def states(
    tensors: list[torch.Tensor], cut: list[list[Piece | None]], fill: bool
) -> tuple[list[dict[str, Any]], list[tuple[torch.Tensor, torch.Tensor]]]:
    """Per rank its state, filled or zero; and every (local, expected) pair of all ranks."""
    ranks = len(cut[0])
    made: list[dict[str, Any]] = [{"x": rank} if ranks == 1 else {"x": 0} for rank in range(ranks)]
    pairs = []
    for number, (full, pieces) in enumerate(zip(tensors, cut, strict=True)):
        for rank, piece in enumerate(pieces):
            if piece is None:
                continue
            expected = piece.of(full).clone()
            local = expected.clone() if fill else torch.zeros_like(expected)
            if isinstance(piece, Range):
                value = sharded(local, tuple(full.shape), flat_range=(piece.start, piece.stop))
            else:
                value = sharded(local, tuple(full.shape), piece.start)
            made[rank][f"t{number}"] = value
            pairs.append((local, expected))
    return made, pairs


def recounted(fragments: list[Fragment], block_bytes: int) -> Fragments:
    """The fragments with their blocks counted anew in each file."""
    blocks: Counter[int] = Counter()
    first = {}
    for fragment in sorted(fragments, key=lambda f: f.offset):
        first[fragment] = blocks[fragment.writer]
        blocks[fragment.writer] += block_count(fragment.nbytes, block_bytes)
    return Fragments.of(replace(fragment, first_block=first[fragment]) for fragment in fragments)


def without_fragment(root: Storage, number: int) -> str:
    """Take one fragment out of the plan of step 1, with every digest made right again; the name of its tensor."""
    history = read_history(root)
    record = history.resolve(1)
    assert record is not None
    contents = Contents.open(root, record)
    plan = contents.plan.whole()
    lost = plan.fragments[number % len(plan.fragments)]
    text = encode_plan(replace(plan, fragments=recounted([f for f in plan.fragments if f != lost], plan.block_bytes)))
    digest = put_plan(root, record.term, text)
    root.delete(record_key(1, record.term))
    root.put_if_absent(record_key(1, record.term), replace(record, plan=digest).encode())
    return plan.tensors[lost.tensor].name


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(cases(), st.integers(0, 1000))
def test_a_removed_fragment_is_always_refused_with_its_name(case: Case, number: int) -> None:
    assume(any(tensor.numel() for tensor in case.tensors))
    root = fresh()
    saved, _ = states(case.tensors, case.source, fill=True)
    save(root, 1, saved)
    name = without_fragment(root, number)
    wanted, pairs = states(case.tensors, case.target, fill=False)
    with pytest.raises(DscheckError, match=f"'{name}'"):
        load(root, wanted)
    assert all(same_bits(local, torch.zeros_like(local)) for local, _ in pairs)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(cases())
def test_any_cut_loads_into_any_other(case: Case) -> None:
    root = fresh()
    saved, _ = states(case.tensors, case.source, fill=True)
    save(root, 1, saved, block_bytes=4096)
    wanted, pairs = states(case.tensors, case.target, fill=False)
    load(root, wanted)
    assert all(same_bits(local, expected) for local, expected in pairs)
