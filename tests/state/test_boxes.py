"""Hand-made shards: boxes and flat ranges, and the state of optimizers that step them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dscheck.errors import ConfigError, LayoutError
from dscheck.layout.region import Region
from dscheck.state import LiveState, Sharded, sharded
from tests.state.roundtrip import load, parts, save


def indices(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


@given(st.data())
def test_boxes_and_flat_ranges_of_any_cut_make_the_whole_and_come_back(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=3)))
    whole = indices(*shape)

    def ranges(label: str) -> list[Sharded]:
        cuts = sorted(data.draw(st.lists(st.integers(0, whole.numel()), max_size=4), label=label))
        return [flat(whole, a, b) for a, b in zip([0, *cuts], [*cuts, whole.numel()], strict=True)]

    def rows(label: str) -> list[Sharded]:
        cuts = sorted(data.draw(st.lists(st.integers(0, shape[0]), max_size=4), label=label))
        pairs = zip([0, *cuts], [*cuts, shape[0]], strict=True)
        return [sharded(whole[a:b].clone(), shape, (a, *[0] * (len(shape) - 1))) for a, b in pairs]

    for source, target in ((ranges, rows), (rows, ranges)):
        pieces = source("source")
        flats = [LiveState({"w": piece}, rank=r, world=len(pieces)).flatten() for r, piece in enumerate(pieces)]
        checkpoint = save(flats)
        assert torch.equal(checkpoint.tensors["w"], whole)
        wanted = target("target")
        for rank, piece in enumerate(wanted):
            expected = piece.local.clone()
            piece.local.zero_()
            load(checkpoint, {"w": piece}, rank=rank, world=len(wanted), rng=False)
            assert torch.equal(piece.local, expected)


def flat(whole: torch.Tensor, start: int, stop: int) -> Sharded:
    return sharded(whole.reshape(-1)[start:stop].clone(), whole.shape, flat_range=(start, stop))


def test_a_flat_range_of_a_scalar_is_the_scalar() -> None:
    flat = LiveState({"s": sharded(torch.tensor([3.0]), (), flat_range=(0, 1))}, rank=0, world=1).flatten()
    (part,) = parts(flat)["s"]
    assert (flat.tensors[0].cut.shape, part.region, part.view.shape) == ((), Region((), ()), ())


def test_a_box_is_an_alias_of_the_local_tensor() -> None:
    local = torch.zeros(2, 3)
    flat = LiveState({"w": sharded(local, (4, 3), (2, 0))}, rank=1, world=2).flatten()
    (part,) = parts(flat)["w"]
    assert part.view.data_ptr() == local.data_ptr()
    assert (part.region, flat.tensors[0].cut.holders) == (Region((2, 0), (4, 3)), (1,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3), (4, 3), (3, 0)), r"ends outside the global shape \[4, 3\]"),
        ((torch.zeros(2, 3), (4, 3), (0,)), "one entry a dimension"),
        ((torch.zeros(2, 3), (4, 3), (-1, 0)), "no negative ones"),
        ((torch.zeros(2), (-2,), (0,)), "no negative sizes"),
    ],
)
def test_a_box_that_does_not_fit_is_refused_when_it_is_declared(arguments: Any, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        sharded(*arguments)


@pytest.mark.parametrize(
    ("local", "flat_range", "message"),
    [
        (torch.zeros(3), (0, 2), r"contiguous tensor of 2 elements, this one has 3"),
        (torch.zeros(3), (10, 13), "outside the 12 elements"),
        (torch.zeros(3), (4, 1), "outside"),
        (torch.zeros(6)[::2], (0, 3), "strides"),
    ],
)
def test_a_flat_range_that_does_not_fit_is_refused_when_it_is_declared(
    local: torch.Tensor, flat_range: tuple[int, int], message: str
) -> None:
    with pytest.raises(LayoutError, match=message):
        sharded(local, (4, 3), flat_range=flat_range)


def test_one_of_offset_and_flat_range_is_needed() -> None:
    with pytest.raises(ConfigError, match="either an offset or flat_range"):
        sharded(torch.zeros(3), (3,))
    with pytest.raises(ConfigError, match="either an offset or flat_range"):
        sharded(torch.zeros(3), (3,), (0,), flat_range=(0, 3))
    with pytest.raises(ConfigError, match="takes a plain tensor, this is a list"):
        sharded([1], (1,), (0,))  # type: ignore[arg-type]


def test_state_of_a_flat_shard_is_cut_like_it() -> None:
    """ZeRO by hand: each rank steps its range of a flattened parameter."""

    def rank_state(rank: int, world: int, fill: float) -> tuple[nn.Parameter, torch.optim.Optimizer, dict[str, Any]]:
        start, stop = rank * 12 // world, (rank + 1) * 12 // world
        local = nn.Parameter(indices(12)[start:stop] * fill)
        optimizer = torch.optim.AdamW([local], lr=0.0)
        state = {"w": sharded(local, (4, 3), flat_range=(start, stop)), "optimizer": optimizer}
        return local, optimizer, state

    flats = []
    for rank in range(5):
        local, optimizer, state = rank_state(rank, 5, 1.0)
        local.grad = local.detach().clone()
        optimizer.step()
        flats.append(LiveState(state, rank=rank, world=5).flatten())
    checkpoint = save(flats)
    assert checkpoint.tensors["optimizer.state.exp_avg.w"].shape == (4, 3)
    assert torch.allclose(checkpoint.tensors["optimizer.state.exp_avg.w"], 0.1 * indices(4, 3))
    for rank in range(2):
        local, optimizer, state = rank_state(rank, 2, 0.0)
        load(checkpoint, state, rank=rank, world=2)
        assert torch.equal(local, indices(12)[rank * 6 : rank * 6 + 6])
        assert torch.allclose(optimizer.state[local]["exp_avg"], 0.1 * local)
        assert optimizer.state[local]["step"].item() == 1.0
