"""Tensors as plain integers: every dtype copies and compares bit for bit, whatever arithmetic torch has for it."""

from __future__ import annotations

import torch

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(view: torch.Tensor) -> torch.Tensor:
    """An alias of `view` with an integer dtype of the same itemsize; complex128 becomes int64 with a last dimension of
    2.

    Conjugate and negative views must have been resolved: they are arithmetic, not memory.
    """
    view = view.detach()
    if view.dtype is torch.complex128:
        return torch.view_as_real(view).view(torch.int64)
    return view.view(_INTEGER[view.dtype.itemsize])
