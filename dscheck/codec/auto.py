"""Which codecs make a save fastest, by the measured rates of the link and of each codec on samples of the state."""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from dscheck.codec.encode import Encoder
from dscheck.manifest.blocks import Codec

TRIES = 2
"""The faster one counts: the first touches memory."""

FINE = 1e-3
"""Choices whose time on the link differs by less, of that without codecs, are not told apart: it bounds them."""


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
    """A codec for each group that is to have one: together the fastest save, to FINE of one without codecs a group.

    >>> slow = {"weights": Group(1000, {Codec.ZSTD: Rate(100.0, 0.5)})}
    >>> fastest(slow, link=10.0), fastest(slow, link=1000.0)
    ({'weights': <Codec.ZSTD: 1>}, {})
    """
    raw = seconds(groups, {}, link)
    # Of what is known so far: seconds of computing, rising, and of the link, falling.
    front: list[tuple[float, float, dict[Hashable, Codec]]] = [(0.0, 0.0, {})]
    for key, group in groups.items():
        grown = [(computing, linking + group.nbytes / link, choice) for computing, linking, choice in front]
        grown += [
            (
                computing + group.nbytes / rate.bytes_per_s,
                linking + group.nbytes * rate.stored / link,
                choice | {key: codec},
            )
            for codec, rate in group.rates.items()
            for computing, linking, choice in front
        ]
        front = []
        for one in sorted(grown, key=lambda one: one[:2]):
            if not front or one[1] < front[-1][1] - FINE * raw:
                front.append(one)
    best = min(front, key=lambda one: max(one[:2]))
    return best[2] if max(best[:2]) < raw else {}
