"""Where verified bytes go: boxes of live host memory for native code, and for torch whatever is more than memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from dscheck.load.needs import Need, Needs, Source
from dscheck.manifest.dtypes import ITEMSIZE
from dscheck.snapshot.bits import bits
from dscheck.state.placements import Part
from dscheck.state.tensors import torch_dtype

Copy = tuple[int, int, int, list[tuple[int, int, int]]]
"""A box for native code: the offset of its first element in the bytes read, the address of its target, the bytes of an
element, and for each dimension its length and the steps in both, in bytes.
"""

_HOST = torch.device("cpu")


class Copies:
    """How native code writes needs, in columns: those that are `plain`, whose stored bytes, as they are, belong to host
    memory at some strides. All others are for torch.
    """

    def __init__(self, needs: Needs) -> None:
        source, want = needs.source, needs.want
        targets = _Targets(source)
        self.plain = targets.plain[want]
        first = ((needs.start - source.low[needs.fragment]) * source.strides[needs.fragment]).sum(axis=1)
        self._source = source.rows.offset[needs.fragment] + first
        self._target = targets.address[want] + ((needs.start - targets.low[want]) * targets.steps[want]).sum(axis=1)
        self._itemsize = source.itemsize[needs.fragment]
        shape = needs.stop - needs.start
        self._axes = np.stack([shape, source.strides[needs.fragment], targets.steps[want]], axis=2)

    def of(self, begin: int, end: int, start: int) -> list[Copy]:
        """The plain ones of the needs [begin, end), out of bytes that begin at `start` of their data file."""
        rows = begin + np.flatnonzero(self.plain[begin:end])
        columns = self._source[rows] - start, self._target[rows], self._itemsize[rows], self._axes[rows]
        return list(zip(*(column.tolist() for column in columns), strict=True))


class _Targets:
    """Of each wanted region that something is needed of, its live memory, as columns: whether it is plain, the address
    of its first element, its bounds and steps, in bytes.
    """

    def __init__(self, source: Source) -> None:
        count, ndim = len(source.wanted), source.low.shape[1]
        self.plain, self.address = np.zeros(count, np.bool_), np.zeros(count, np.int64)
        self.low, self.steps = np.zeros((count, ndim), np.int64), np.zeros((count, ndim), np.int64)
        for number in np.unique(source.want).tolist():
            tensor, _, part = source.wanted[number]
            dtype = source.tensors[tensor].dtype
            if is_plain(part, dtype):
                self.plain[number], self.address[number] = True, part.view.data_ptr()
                self.low[number, : part.view.ndim] = part.region.start
                self.steps[number, : part.view.ndim] = np.array(part.view.stride(), np.int64) * ITEMSIZE[dtype]


def is_plain(part: Part, dtype: str) -> bool:
    """Whether bytes of `dtype`, as they are, belong to its host memory at some strides."""
    view = part.view
    same = view.device == _HOST and view.dtype is torch_dtype(dtype)
    return same and view.layout is torch.strided and not view.is_conj() and not view.is_neg()


def mark_written(parts: Iterable[Part]) -> None:
    """Autograd, and whoever watches version counters, sees that their host memory has changed."""
    views = {id(part): part.view for part in parts if part.view.device == _HOST}
    torch.autograd.graph.increment_version([view for view in views.values() if not view.is_inference()])


class Deliveries:
    """Needs that torch writes: of other dtypes, and of devices, through a stream of their own beside the host's work.

    Bytes on their way to a device are in use until their delivery is over.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.Stream] = {}
        self._under_way: list[tuple[torch.Tensor, Callable[[], object], list[torch.Event]]] = []

    def __bool__(self) -> bool:
        return bool(self._under_way)

    def start(
        self, buffer: torch.Tensor, needs: Sequence[tuple[Need, int]], over: Callable[[], object] = lambda: None
    ) -> None:
        """Needs of `buffer` (bytes, on any device), each with where its fragment would begin there, maybe before.

        `over` is called by `tidy`.
        """
        for need, base in needs:
            device = need.target.view.device
            if device == _HOST:
                _deliver(need, buffer, base)
            else:
                with self._stream(device):
                    _deliver(need, buffer, base)
        devices = {need.target.view.device for need, _ in needs} - {_HOST}
        self._under_way.append((buffer, over, [self._stream(device).record_event() for device in devices]))

    def tidy(self) -> None:
        """End what has arrived."""
        under_way, self._under_way = self._under_way, []
        for buffer, over, events in under_way:
            if all(event.query() for event in events):
                over()
            else:
                self._under_way.append((buffer, over, events))

    def finish(self) -> None:
        """Return when everything has arrived."""
        for stream in self._streams.values():
            stream.synchronize()

    def _stream(self, device: torch.device) -> torch.Stream:
        if device not in self._streams:
            self._streams[device] = torch.Stream(device)
        return self._streams[device]


def _deliver(need: Need, buffer: torch.Tensor, base: int) -> None:
    part: Part = need.target
    dtype = torch_dtype(need.row.dtype)
    view = part.view[need.box.relative_to(part.region.start).slices()] if part.view.ndim else part.view
    first, span, strides = _extent(need, base, dtype.itemsize)
    stored = buffer[first : first + span * dtype.itemsize].to(view.device, non_blocking=True)
    if first % dtype.itemsize:  # behind blocks that are no whole elements
        stored = stored.clone()
    elements = stored.view(dtype).as_strided(need.box.shape, strides)
    with torch.no_grad():
        if view.dtype is not dtype or view.is_conj() or view.is_neg():
            view.detach().copy_(elements)
        else:
            bits(view).copy_(bits(elements))


def _extent(need: Need, base: int, itemsize: int) -> tuple[int, int, list[int]]:
    """Of the box in the bytes read: its first byte, the elements it spans, and its strides in elements."""
    strides = _row_major(need.fragment.region.shape)
    inner = need.box.relative_to(need.fragment.region.start)
    first = base + itemsize * sum(a * s for a, s in zip(inner.start, strides, strict=True))
    return first, 1 + sum((n - 1) * s for n, s in zip(need.box.shape, strides, strict=True)), strides


def _row_major(shape: Sequence[int]) -> list[int]:
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= length
    return strides[::-1]
