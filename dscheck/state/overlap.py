"""Which live memory can be filled one element at a time: elements apart from each other, and from other targets'."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import islice

import torch

from dscheck.errors import StateMismatchError
from dscheck.state.leaf import Target
from dscheck.state.tensors import is_lazy_view, memory_key

_CANDIDATES = 10_000  # distances tried a dimension: slices of one tensor need one or two


def is_fillable(local: torch.Tensor) -> bool:
    """Whether writing its elements, in any order, makes it show exactly what was written."""
    return not is_lazy_view(local) and not overlaps_itself(local)


def overlaps_itself(local: torch.Tensor) -> bool:
    """Whether two of its elements may be one in memory. Interleaved strides, which slicing never makes, count too.

    >>> overlaps_itself(torch.ones(1).expand(3)), overlaps_itself(torch.ones(4, 6)[:, 1:3].t())
    (True, False)
    """
    extent = 1
    for stride, size in sorted(zip(local.stride(), local.shape, strict=True)) if local.numel() else ():
        if size > 1 and stride < extent:
            return True
        extent += stride * (size - 1)
    return False


def refuse_shared_elements(targets: Iterable[Target]) -> None:
    """Raise StateMismatchError, by both names, when a load would write some bytes from two saved tensors.

    The very same memory under two names is a tie, and no error here. No part may overlap itself.
    """
    views = {memory_key(part.view): (target.name, part.view) for target in targets for part in target.parts}
    spans = sorted(
        (str(view.device), view.data_ptr(), view.data_ptr() + _span_bytes(view), number, name, view)
        for number, (name, view) in enumerate(views.values())
    )
    for index, (device, _, stop, _, name, view) in enumerate(spans):
        for other_device, other_start, _, _, other_name, other in islice(spans, index + 1, None):
            if other_device != device or other_start >= stop:
                break
            if _share_bytes(view, other):
                raise StateMismatchError(
                    f"'{name}' and '{other_name}' are partly the same memory, so loading one would overwrite the "
                    "other: keep one of them in the state, or load one of them with only=[...]",
                    names=[name, other_name],
                )


def _span_bytes(view: torch.Tensor) -> int:
    """From its first byte to behind its last one."""
    return view.element_size() * (1 + sum(s * (n - 1) for s, n in zip(view.stride(), view.shape, strict=True)))


def _share_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether a byte of `one` is one of `other` too; False where this takes too long to find out.

    Bytes meet where the sum of stride * k over all dimensions is the distance of the two, k being the difference of
    the two indices. From the largest stride down, few k leave a rest that the smaller ones can make up.
    """
    least: Counter[int] = Counter()
    most: Counter[int] = Counter()
    for view, bounds in ((one, most), (other, least)):
        size = view.element_size()
        for stride, length in ((1, size), *((s * size, n) for s, n in zip(view.stride(), view.shape, strict=True))):
            if length > 1:
                bounds[stride] += length - 1
    low = -sum(stride * count for stride, count in least.items())
    high = sum(stride * count for stride, count in most.items())
    rests = {other.data_ptr() - one.data_ptr()}
    for stride in sorted(least.keys() | most.keys(), reverse=True):
        low, high = low + stride * least[stride], high - stride * most[stride]
        ranges = [
            (rest, max(-least[stride], -((high - rest) // stride)), min(most[stride], (rest - low) // stride))
            for rest in rests
        ]
        if sum(last - first + 1 for _, first, last in ranges if first <= last) > _CANDIDATES:
            return False
        rests = {rest - stride * k for rest, first, last in ranges for k in range(first, last + 1)}
    return 0 in rests
