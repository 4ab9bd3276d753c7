"""Which codec each fragment of a rank's data file has.

Each rank chooses by itself: its file says what the choice was, and no plan changes by it.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Protocol

import numpy as np

from dscheck.codec.auto import Group, fastest, measure, seconds
from dscheck.codec.choice import codec_of
from dscheck.codec.encode import LEAST_BYTES, Encoder
from dscheck.config import Settings
from dscheck.manifest.blocks import Codec
from dscheck.save.fragments import Layout
from dscheck.save.shares import Box
from dscheck.storage.base import Storage

log = logging.getLogger("dscheck")

PLAIN_SAVES = 2
"""Measured before anything is compressed; the faster one counts, as the first touches memory and opens connections."""

GAIN = 0.9
"""What codecs must promise to be tried, of the time without."""

KEPT = 0.97
"""What they must then have taken, to be kept."""

SAMPLES, SAMPLE_BLOCKS = 4, 4
"""Read back of each group: so many places with so many blocks."""


class Choice(Protocol):
    """Of one rank, for save after save."""

    def of(self, boxes: Sequence[Box]) -> Sequence[Codec]:
        """One for each box, in this order; none where the file is to be a plain one."""

    def wrote(self, storage: Storage, key: str, layout: Layout, seconds: float) -> None:
        """The data file `key`, by what `of` said last, took so long and is committed. Never raises."""


class Fixed:
    """By the setting and the dtype alone."""

    def __init__(self, settings: Settings) -> None:
        self._name = settings.codec
        self._boxes: Sequence[Box] = ()
        self._codecs: tuple[Codec, ...] = ()

    def of(self, boxes: Sequence[Box]) -> Sequence[Codec]:
        if self._name == "none":
            return ()
        if boxes is not self._boxes:
            self._boxes, self._codecs = boxes, tuple(codec_of(self._name, box.held.claim.dtype) for box in boxes)
        return self._codecs

    def wrote(self, storage: Storage, key: str, layout: Layout, seconds: float) -> None:
        return


class Measured:
    """What was faster: some saves are plain, then one tries what samples of them promise, and shows whether it is."""

    def __init__(self, settings: Settings) -> None:
        self._block_bytes, self._threads = settings.block_bytes, settings.io_threads
        self._plain: list[float] = []
        """Seconds a byte of each plain save so far."""
        self._choice: Mapping[Hashable, Codec] = {}
        self._trying = False

    def of(self, boxes: Sequence[Box]) -> Sequence[Codec]:
        if not self._choice:
            return ()
        return [self._choice.get(group_of(box), Codec.RAW) for box in boxes]

    def wrote(self, storage: Storage, key: str, layout: Layout, seconds: float) -> None:
        nbytes = sum(layout.sizes)
        if not nbytes:
            return
        if self._trying:
            self._trying = False
            if seconds / nbytes > KEPT * min(self._plain):
                self._choice = {}
            log.info("codec: %s, %.3g s/GB with and %.3g without", *self._outcome(seconds / nbytes))
        elif not self._choice and len(self._plain) < PLAIN_SAVES:
            self._plain.append(seconds / nbytes)
            if len(self._plain) == PLAIN_SAVES:
                self._choose(storage, key, layout)

    def _outcome(self, coded: float) -> tuple[str, float, float]:
        return "kept" if self._choice else "none is faster", coded * 1e9, min(self._plain) * 1e9

    def _choose(self, storage: Storage, key: str, layout: Layout) -> None:
        try:
            groups = self._groups(storage, key, layout)
        except Exception as error:  # the step is committed: whatever fails here is no failure of it (C8)
            log.warning("codec: nothing is compressed, as a sample could not be read: %s", error)
            return
        link = 1 / min(self._plain)
        choice = fastest(groups, link)
        if seconds(groups, choice, link) <= GAIN * seconds(groups, {}, link):
            self._choice, self._trying = choice, True

    def _groups(self, storage: Storage, key: str, layout: Layout) -> dict[Hashable, Group]:
        """The tensors of a plain data file, by what they are, with what codecs do to samples of them."""
        encoder, members = Encoder(self._block_bytes, self._threads), defaultdict(list)
        for number, box in enumerate(layout.boxes):
            if layout.sizes[number] >= LEAST_BYTES:
                members[group_of(box)].append(number)
        groups: dict[Hashable, Group] = {}
        for group, numbers in members.items():
            sizes, offsets = [np.array([column[i] for i in numbers]) for column in (layout.sizes, layout.offsets)]
            dtype = layout.boxes[numbers[0]].held.claim.dtype
            codecs = {codec_of("zstd", dtype), codec_of("shuffle-zstd", dtype)}
            sample = b"".join(storage.read(key, *place) for place in self._places(sizes, offsets))
            groups[group] = Group(int(sizes.sum()), measure(encoder, memoryview(sample), sorted(codecs)))
        return groups

    def _places(self, sizes: np.ndarray, offsets: np.ndarray) -> list[tuple[int, int]]:
        """Offset and length of some whole blocks, evenly spread; of tensors shorter than one, some of them whole."""
        long = sizes >= self._block_bytes
        if not long.any():
            some = np.unique(np.linspace(0, len(sizes) - 1, SAMPLES).astype(int))
            return [(int(offsets[i]), int(sizes[i])) for i in some]
        counts, offsets = sizes[long] // self._block_bytes, offsets[long]
        ends = np.cumsum(counts)
        places = []
        for at in np.unique(np.linspace(0, int(ends[-1]) - 1, SAMPLES).astype(np.int64)):
            box = int(np.searchsorted(ends, at, side="right"))
            block = int(at - ends[box] + counts[box])
            count = min(SAMPLE_BLOCKS, int(counts[box]) - block)
            places.append((int(offsets[box]) + block * self._block_bytes, count * self._block_bytes))
        return places


def choice_of(settings: Settings) -> Choice:
    return Measured(settings) if settings.codec == "auto" else Fixed(settings)


def group_of(box: Box) -> tuple[str, str]:
    """Dtype, and the name's first part, of an optimizer's state with its key: moments are not like weights."""
    top, _, rest = box.held.claim.name.partition(".")
    parts = rest.split(".", 2)
    return box.held.claim.dtype, f"{top}.{parts[1]}" if parts[0] == "state" and len(parts) > 2 else top
