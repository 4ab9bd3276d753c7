"""Where tensors lie, told natively: compared with what torch says of them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dscheck.manifest.dtypes import ITEMSIZE
from dscheck.native import Memory


def test_unchanged_tensors_come_back_themselves() -> None:
    tensors = [torch.ones(3, 4), torch.nn.Parameter(torch.ones(2)), torch.tensor(1.0), torch.empty(0, 3)]
    memory = Memory(tensors)
    found = memory.tensors()
    assert found is not None
    assert all(one is other for one, other in zip(found, tensors, strict=True))
    tensors[0].add_(1)
    assert memory.tensors() is not None
    assert Memory([]).tensors() == []


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "another address": torch.clone,
    "another offset": lambda t: t.view(-1)[1:5].view(2, 2),
    "fewer rows": lambda t: t[:3],
    "transposed": torch.t,
    "another number of dimensions": lambda t: t.view(-1),
    "another dtype of the same size": lambda t: t.view(torch.int32),
    "another stride": lambda t: t[:, ::2],
    "one dimension more": lambda t: t.view(1, 4, 4),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_other_memory_or_another_shape_of_it_is_seen(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensor, before = torch.ones(4, 4), torch.ones(4, 4)
    tensor.set_(before)  # type: ignore[call-overload]
    memory = Memory([torch.ones(1), tensor])
    tensor.data = change(before)
    assert memory.tensors() is None
    tensor.data = before


def test_a_tensor_that_is_gone_is_seen_and_was_not_kept() -> None:
    tensor = torch.ones(3)
    gone, memory = weakref.ref(tensor), Memory([tensor])
    del tensor
    gc.collect()
    assert gone() is None
    assert memory.tensors() is None


@pytest.mark.parametrize("name", sorted(name for name in ITEMSIZE if hasattr(torch, name)))
def test_every_dtype_of_a_checkpoint_is_known(name: str) -> None:
    tensor = torch.empty(4, dtype=getattr(torch, name))
    found = Memory([tensor]).tensors()
    assert found is not None
    assert found[0] is tensor


def test_alike_are_equal_shapes_strides_dtypes_and_devices_anywhere() -> None:
    def memory(*tensors: torch.Tensor) -> Memory:
        kept.extend(tensors)
        return Memory(tensors)

    kept: list[torch.Tensor] = []
    one = memory(torch.ones(2, 3), torch.ones(4))
    assert one.is_like(memory(torch.zeros(2, 3), torch.zeros(4)))
    others: list[Any] = [
        (torch.ones(2, 3),),
        (torch.ones(4), torch.ones(2, 3)),
        (torch.ones(3, 2).t(), torch.ones(4)),
        (torch.ones(2, 3, dtype=torch.int32), torch.ones(4)),
        (torch.ones(2, 3, 1), torch.ones(4)),
        (torch.ones(6), torch.ones(4)),
    ]
    assert not any(one.is_like(memory(*other)) for other in others)


def test_what_has_no_memory_of_its_own_is_refused() -> None:
    for tensor in (torch.ones(2, device="meta"), torch.eye(2).to_sparse()):
        with pytest.raises(Exception, match=r"meta|storage"):
            Memory([tensor])
