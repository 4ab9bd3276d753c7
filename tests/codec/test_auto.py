"""What "auto" chooses, by rates that are given; and what it does when the promise is not kept."""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dscheck.codec.auto import FINE, Group, Rate, fastest, measure, seconds
from dscheck.codec.encode import Encoder
from dscheck.config import Settings
from dscheck.manifest.blocks import Codec
from dscheck.save.codecs import Measured, group_of
from dscheck.storage import Storage
from tests.end_to_end.worlds import fresh

RATES = st.builds(Rate, st.floats(1e7, 1e10), st.floats(0.05, 1.0))
GROUPS = st.dictionaries(
    st.sampled_from("abc"),
    st.builds(Group, st.integers(1, 10**9), st.fixed_dictionaries({Codec.ZSTD: RATES, Codec.SHUFFLE_4: RATES})),
    max_size=3,
)


@given(groups=GROUPS, link=st.floats(1e6, 1e10))
def test_the_choice_is_never_slower_than_none_and_near_the_best(groups: dict[Hashable, Group], link: float) -> None:
    found = seconds(groups, fastest(groups, link), link)
    every = itertools.product([Codec.RAW, Codec.ZSTD, Codec.SHUFFLE_4], repeat=len(groups))
    best = min(seconds(groups, dict(zip(groups, choice, strict=True)), link) for choice in every)
    none = seconds(groups, {}, link)
    assert best <= found <= min(none, best + len(groups) * FINE * none) * (1 + 1e-9)


def test_a_slow_link_gets_all_and_a_fast_one_nothing() -> None:
    rate = {Codec.ZSTD: Rate(5e8, 0.9), Codec.SHUFFLE_4: Rate(4e8, 0.7)}
    groups: dict[Hashable, Group] = {"weights": Group(10**9, rate), "noise": Group(10**9, {Codec.ZSTD: Rate(1e9, 1.0)})}
    assert fastest(groups, 1e8) == {"weights": Codec.SHUFFLE_4}
    assert fastest(groups, 5e9) == {}


def test_a_measured_rate_is_that_of_the_sample() -> None:
    found = measure(Encoder(4096, 1), memoryview(bytes(1 << 16)), [Codec.ZSTD])[Codec.ZSTD]
    assert found.bytes_per_s > 0
    assert found.stored < 0.02


class Saves:
    """A rank's saves as `Measured` hears of them: 8 MiB of zeros, which any codec shrinks, and 4 MiB of noise."""

    def __init__(self, storage: Storage | None = None) -> None:
        zeros, noise = bytes(8 << 20), np.random.default_rng(1).bytes(4 << 20)
        self.storage = storage or fresh()
        writer = self.storage.create("data")
        for part in (zeros, noise):
            writer.write(part)
        writer.commit()
        self.boxes = [box("model.w"), box("ema.w")]
        self.layout: Any = SimpleNamespace(boxes=self.boxes, sizes=[8 << 20, 4 << 20], offsets=[0, 8 << 20])
        self.auto = Measured(Settings(codec="auto"))

    def save(self, seconds: float) -> list[Codec]:
        """One more save, which took so long; by which codecs."""
        used = [*self.auto.of(self.boxes)]
        self.auto.wrote(self.storage, "data", self.layout, seconds)
        return used


def box(name: str) -> Any:
    return SimpleNamespace(held=SimpleNamespace(claim=SimpleNamespace(name=name, dtype="float32")))


def test_the_first_saves_are_plain_and_then_what_shrinks_is_compressed_if_that_is_faster() -> None:
    saves = Saves()
    assert saves.save(90.0) == saves.save(60.0) == []
    for took in (20.0, 21.0, 59.0):
        used = saves.save(took)
        assert used[0] in (Codec.ZSTD, Codec.SHUFFLE_4)
        assert used[1] is Codec.RAW


def test_a_codec_that_is_tried_and_no_faster_is_given_up_for_good() -> None:
    saves = Saves()
    saves.save(60.0)
    saves.save(90.0)
    assert saves.save(59.0)
    assert [saves.save(took) for took in (60.0, 90.0, 10.0)] == [[], [], []]


def test_a_codec_that_becomes_slow_is_given_up_after_two_saves_in_a_row() -> None:
    saves = Saves()
    took = [60.0, 60.0, 20.0, 70.0, 20.0, 70.0, 70.0, 20.0]
    assert [bool(saves.save(seconds)) for seconds in took] == [False, False, True, True, True, True, True, False]


def test_on_a_link_that_is_faster_than_any_codec_nothing_is_tried() -> None:
    saves = Saves()
    assert [saves.save(1e-6) for _ in range(4)] == [[]] * 4


def test_a_sample_that_cannot_be_read_leaves_saves_as_they_are(caplog: Any) -> None:
    saves = Saves()
    saves.save(60.0)
    saves.storage.delete("data")
    assert [saves.save(60.0) for _ in range(3)] == [[]] * 3
    assert "sample could not be read" in caplog.text


def test_moments_are_not_measured_with_weights() -> None:
    names = ["model.a.w", "optimizer.state.exp_avg.model.a.w", "optimizer.state.exp_avg.model.b", "loose"]
    groups = [group_of(box(name)) for name in names]
    assert groups == [
        ("float32", "model"),
        ("float32", "optimizer.exp_avg"),
        ("float32", "optimizer.exp_avg"),
        ("float32", "loose"),
    ]
