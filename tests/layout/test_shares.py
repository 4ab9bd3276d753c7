"""Writer shares: they tile, they balance, and they never change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dscheck.errors import LayoutError
from dscheck.layout import Region, prove_cover
from dscheck.layout import writer_shares as columns

MIB = 1 << 20
LARGE = (
    (262_144,),
    (262_145,),
    (1_000_003,),
    (7, 1_000_003),
    (1_000_003, 7),
    (32_000, 4096),
    (4096, 14_336),
    (64, 8, 7, 333),
    (3, 3, 512, 512),
    (1, 1, 600_000),
    (2, 131_073),
    (17, 19, 23, 41),
)


def writer_shares(name: str, region: Region, itemsize: int, holders: Sequence[int]) -> tuple[tuple[int, Region], ...]:
    """The rows as pairs of a rank and a box."""
    writers, boxes = columns(name, region, itemsize, holders)
    return tuple(zip(writers.tolist(), map(boxes.region, range(len(boxes))), strict=True))


@given(st.data())
def test_shares_tile_the_region(data: st.DataObject) -> None:
    shape = data.draw(st.one_of(st.sampled_from(LARGE), st.lists(st.integers(0, 70), max_size=4).map(tuple)))
    region = Region.whole(shape).shift(data.draw(st.tuples(*(st.integers(0, 99) for _ in shape))))
    holders = sorted(data.draw(st.sets(st.integers(0, 999), min_size=1, max_size=16)))
    itemsize = data.draw(st.sampled_from([1, 2, 4, 8]))
    shares = writer_shares("layer.weight", region, itemsize, holders)
    assert {rank for rank, _ in shares} <= set(holders)
    assert all(region.contains(box) and box.numel for _, box in shares)
    prove_cover("layer.weight", shape, [box.relative_to(region.start) for _, box in shares])


def bytes_of_ranks(shapes: dict[str, tuple[int, ...]], itemsize: int, holders: range) -> Counter[int]:
    written = Counter[int]()
    for name, shape in shapes.items():
        for rank, box in writer_shares(name, Region.whole(shape), itemsize, holders):
            written[rank] += box.numel * itemsize
    return written


@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 7, 8, 12, 16])
def test_each_large_region_is_written_evenly(shape: tuple[int, ...], ranks: int) -> None:
    written = bytes_of_ranks({"w": shape}, 4, range(ranks))
    mean = sum(written.values()) / ranks
    assert len(written) == ranks
    assert max(written.values()) <= 1.04 * mean


@pytest.mark.parametrize("ranks", [2, 6, 16])
def test_a_model_is_written_evenly(ranks: int) -> None:
    """Biases and norms, under 1 MiB, go whole to one rank each; they must not pile up on one."""
    model: dict[str, tuple[int, ...]] = {"embed.weight": (32_000, 1024)}
    for layer in range(24):
        for name, shape in {
            "qkv": (3072, 1024),
            "proj": (1024, 1024),
            "up": (4096, 1024),
            "down": (1024, 4096),
        }.items():
            model |= {f"layers.{layer}.{name}.weight": shape, f"layers.{layer}.{name}.bias": shape[:1]}
    written = bytes_of_ranks(model, 2, range(ranks))
    assert max(written.values()) <= 1.1 * sum(written.values()) / ranks
    small = {name: shape for name, shape in model.items() if len(shape) == 1}
    counts = Counter(
        rank for name in small for rank, _ in writer_shares(name, Region.whole(small[name]), 2, range(ranks))
    )
    assert max(counts.values()) <= 2.5 * len(small) / ranks


def test_cuts_keep_rows_whole_where_that_is_cheap() -> None:
    shares = writer_shares("w", Region.whole((4001, 4096)), 4, range(8))
    assert len(shares) == 8
    assert all(box.shape[1] == 4096 for _, box in shares)


def test_few_long_rows_are_cut() -> None:
    assert len(writer_shares("w", Region.whole((7, 1_000_003)), 4, range(2))) == 4


def test_below_one_mebibyte_one_rank_writes_all() -> None:
    region = Region((0,), (MIB // 4 - 1,))
    assert len(writer_shares("w", region, 4, range(8))) == 1
    assert len(writer_shares("w", Region((0,), (MIB // 4,)), 4, range(8))) == 8


def test_shares_never_change() -> None:
    """Ranks of different versions, and steps of one run, must agree: another answer here is another protocol."""
    assert writer_shares("model.norm.weight", Region.whole((4096,)), 4, (0, 1, 2, 3, 4)) == (
        (1, Region((0,), (4096,))),
    )
    assert writer_shares("model.norm.weight", Region((8, 0), (607, 1000)), 4, (1, 4, 9)) == (
        (1, Region((8, 0), (208, 1000))),
        (4, Region((208, 0), (407, 1000))),
        (9, Region((407, 0), (607, 1000))),
    )
    assert writer_shares("model.embed.weight", Region.whole((600, 1000)), 4, (1, 4, 9)) == (
        (9, Region((0, 0), (200, 1000))),
        (1, Region((200, 0), (400, 1000))),
        (4, Region((400, 0), (600, 1000))),
    )
    assert writer_shares("", Region((), ()), 8, (3, 5, 7)) == ((7, Region((), ())),)


def test_empty_region_has_no_writer() -> None:
    assert writer_shares("w", Region((0, 3), (9, 3)), 4, (0, 1)) == ()


def test_every_string_is_a_name() -> None:
    assert len(writer_shares("\ud800", Region((0,), (4,)), 4, (0, 1))) == 1


@pytest.mark.parametrize("holders", [(), (1, 1), (2, 1)])
def test_holders_that_ranks_could_order_differently_are_refused(holders: tuple[int, ...]) -> None:
    with pytest.raises(LayoutError, match="must be one or more ranks, ascending"):
        writer_shares("w", Region((0,), (4,)), 4, holders)
