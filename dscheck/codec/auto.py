"""Which codecs make a save fastest, by the measured rates of the link and of each codec on samples of the state."""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from dscheck.codec.encode import Encoder
from dscheck.manifest.blocks import Codec

TRIES = 2
"""The faster one counts: the first touches memory."""


@dataclass(frozen=True, slots=True)
class Rate:
    """What a codec makes of a sample: raw bytes a second, and stored bytes for each raw one."""

    bytes_per_s: float
    stored: float


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors that are much alike: `nbytes` of them in a save, and what each codec that may serve does to them."""

    nbytes: int
    rates: Mapping[Codec, Rate]


def measure(encoder: Encoder, sample: memoryview, codecs: Sequence[Codec]) -> dict[Codec, Rate]:
    """Each codec on whole blocks of a group."""
    found = {}
    for codec in codecs:
        seconds = []
        for _ in range(TRIES):
            began = time.perf_counter()
            encoded = encoder.encode(sample, codec)
            seconds.append(time.perf_counter() - began)
        found[codec] = Rate(len(sample) / max(min(seconds), 1e-9), len(encoded.data) / len(sample))
    return found


def seconds(groups: Mapping[Hashable, Group], choice: Mapping[Hashable, Codec], link: float) -> float:
    """What a save takes: the link, of `link` bytes a second, and the codecs work side by side."""
    computing = linking = 0.0
    for key, group in groups.items():
        rate = group.rates.get(choice.get(key, Codec.RAW))
        computing += group.nbytes / rate.bytes_per_s if rate else 0.0
        linking += group.nbytes * (rate.stored if rate else 1.0) / link
    return max(computing, linking)


def fastest(groups: Mapping[Hashable, Group], link: float) -> dict[Hashable, Codec]:
    """A codec for each group that has one; the change that saves most comes first, until none saves anything.

    >>> slow = {"weights": Group(1000, {Codec.ZSTD: Rate(100.0, 0.5)})}
    >>> fastest(slow, link=10.0), fastest(slow, link=1000.0)
    ({'weights': <Codec.ZSTD: 1>}, {})
    """
    choice: dict[Hashable, Codec] = {}
    best = seconds(groups, choice, link)
    while True:
        changes = [{**choice, key: codec} for key, group in groups.items() for codec in group.rates]
        change = min(changes, key=lambda change: seconds(groups, change, link), default=choice)
        found = seconds(groups, change, link)
        if found >= best:
            return choice
        choice, best = change, found
