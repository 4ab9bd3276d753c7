"""Random streams: exact on the same number of ranks, derived on another."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from dscheck.state import LiveState, rng
from tests.state.roundtrip import Checkpoint, load, save


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def draw() -> list[float]:
    """Some numbers of each stream, an odd one of each that keeps a spare normal."""
    return [random.random(), random.gauss(0, 1), np.random.normal(), np.random.rand(), *torch.rand(3).tolist()]


@pytest.fixture
def checkpoint_of_two() -> Checkpoint:
    """Two ranks with streams of their own."""
    flats = []
    for rank in range(2):
        seed(rank)
        draw()
        flats.append(LiveState({}, rank=rank, world=2).flatten())
    return save(flats)


def test_every_stream_goes_on_exactly_on_the_same_number_of_ranks(checkpoint_of_two: Checkpoint) -> None:
    for rank in range(2):
        seed(rank)
        draw()
        expected = draw()
        seed(9)
        draw()
        assert load(checkpoint_of_two, {}, rank=rank, world=2)[1] == "exact"
        assert draw() == expected


def test_the_spare_normal_is_saved_too() -> None:
    seed(1)
    random.gauss(0, 1)
    np.random.normal()
    checkpoint = save({})
    expected = draw()
    seed(2)
    load(checkpoint, {})
    assert draw() == expected


def test_capturing_draws_nothing() -> None:
    seed(1)
    expected = draw()
    seed(1)
    LiveState({}, rank=0, world=1).flatten()
    assert draw() == expected


def test_another_number_of_ranks_derives_streams_that_differ_and_repeat(checkpoint_of_two: Checkpoint) -> None:
    streams = {}
    for world in (1, 3, 3):
        for rank in range(world):
            seed(7)
            assert load(checkpoint_of_two, {}, rank=rank, world=world)[1] == "equivalent"
            drawn = draw()
            assert streams.setdefault((world, rank), drawn) == drawn
    drawn = [value for values in streams.values() for value in values]
    assert len(set(drawn)) == len(drawn)


def test_one_saved_rank_does_not_give_all_ranks_the_same_stream() -> None:
    seed(1)
    checkpoint = save({})
    streams = []
    for rank in range(2):
        assert load(checkpoint, {}, rank=rank, world=2)[1] == "equivalent"
        streams.append(draw())
    assert not set(streams[0]) & set(streams[1])


def test_a_stream_that_all_ranks_shared_goes_on_on_all() -> None:
    flats = []
    for rank in range(2):
        seed(1)
        random.seed(rank)
        flats.append(LiveState({}, rank=rank, world=2).flatten())
    expected = torch.rand(3).tolist()
    streams = []
    for rank in range(3):
        assert load(save(flats), {}, rank=rank, world=3)[1] == "equivalent"
        streams.append((random.random(), torch.rand(3).tolist()))
    assert [drawn for _, drawn in streams] == [expected] * 3
    assert len({drawn for drawn, _ in streams}) == 3


@pytest.mark.parametrize("settings", [{"rng": False}, {"only": ["x"]}])
def test_streams_are_left_alone_when_not_asked_for(settings: dict[str, Any]) -> None:
    checkpoint = save({"x": 1})
    seed(4)
    expected = draw()
    seed(4)
    assert load(checkpoint, {"x": 1}, **settings)[1] == "none"
    assert draw() == expected


def test_a_checkpoint_without_streams_says_none() -> None:
    assert load(save({"x": 1}, rng=False), {"x": 1})[1] == "none"
    assert load(save({"x": 1}), {"x": 1}, only=["dscheck.rng"])[1] == "exact"


def test_many_saved_ranks_are_sampled_evenly_from_the_first_to_the_last() -> None:
    assert rng.sampled(64) == list(range(64))
    sampled = rng.sampled(16384)
    assert (len(set(sampled)), sampled[0], sampled[-1]) == (64, 0, 16383)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_stream_of_the_accelerator_goes_on() -> None:
    torch.cuda.manual_seed(3)
    torch.rand(5, device="cuda")
    checkpoint = save({})
    expected = torch.rand(5, device="cuda").tolist()
    torch.cuda.manual_seed(4)
    assert load(checkpoint, {})[1] == "exact"
    assert torch.rand(5, device="cuda").tolist() == expected
    del checkpoint.flats[0].mine["dscheck.rng"]["accelerator"]
    assert load(checkpoint, {})[1] == "equivalent"
