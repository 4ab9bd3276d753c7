"""Tensors as plain integers: every dtype copies and compares bit for bit, whatever arithmetic torch has for it."""

from __future__ import annotations

import functools

import torch

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
EDGE, INNER = 16, 32


def bits(view: torch.Tensor) -> torch.Tensor:
    """An alias of `view` with an integer dtype of the same itemsize; complex128 becomes int64 with a last dimension of
    2.

    Conjugate and negative views must have been resolved: they are arithmetic, not memory.
    """
    view = view.detach()
    if view.dtype is torch.complex128:
        return torch.view_as_real(view).view(torch.int64)
    return view.view(_INTEGER[view.dtype.itemsize])


def on_host(nbytes: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The host bytes `nbytes` (1-D uint8, 64-byte aligned) as a contiguous tensor of the shape and dtype of `like`."""
    return nbytes.view(like.dtype).view(like.shape)


@functools.lru_cache(maxsize=65536)
def _positions(shape: tuple[int, ...], stride: tuple[int, ...], device: torch.device) -> torch.Tensor:
    numel = functools.reduce(int.__mul__, shape, 1)
    if numel <= 2 * EDGE + INNER:
        flat = list(range(numel))
    else:
        step = (numel - 2 * EDGE) / (INNER + 1)
        inner = [EDGE + int(step * (i + 1)) for i in range(INNER)]
        flat = [*range(EDGE), *inner, *range(numel - EDGE, numel)]
    offsets = []
    for index in flat:
        offset = 0
        for length, step_in in zip(reversed(shape), reversed(stride), strict=True):
            index, position = divmod(index, length)
            offset += position * step_in
        offsets.append(offset)
    return torch.tensor(offsets, dtype=torch.int64, device=device)


def sample(view: torch.Tensor) -> torch.Tensor:
    """First, last and inner elements of an integer tensor in row-major order, gathered on its device without a copy of
    it.

    Two tensors of one shape are sampled at the same indices, whatever their strides (TRAPS 19: edges and interior).
    """
    if view.numel() == 0:
        return view.new_empty(0)
    shape, stride = tuple(view.shape), view.stride()
    span = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    return view.as_strided((span,), (1,)).index_select(0, _positions(shape, stride, view.device))
