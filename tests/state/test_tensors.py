"""Every kind of torch tensor is stored as what it shows, or refused by path (TRAP 12)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dscheck.errors import StateError, StateMismatchError
from dscheck.manifest.dtypes import ITEMSIZE
from dscheck.state import LiveState
from dscheck.state.tensors import torch_dtype
from tests.state.roundtrip import load, save


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@pytest.mark.parametrize("name", ITEMSIZE)
@pytest.mark.parametrize("shape", [(), (3, 4), (0, 2)], ids=str)
def test_every_dtype_comes_back_bit_for_bit(name: str, shape: tuple[int, ...]) -> None:
    count = torch.Size(shape).numel() * ITEMSIZE[name]
    pattern = torch.tensor([value % (2 if name == "bool" else 251) for value in range(1, count + 1)], dtype=torch.uint8)
    tensor = pattern.view(torch_dtype(name)).view(shape) if count else torch.empty(shape, dtype=torch_dtype(name))
    expected = raw(tensor)
    checkpoint = save({"tensor": tensor})
    assert next(iter(checkpoint.tensors.values())).dtype is torch_dtype(name)
    target = tensor.clone()
    target.view(-1).view(torch.uint8).zero_() if count else None
    load(checkpoint, {"tensor": target})
    assert raw(target) == expected


@pytest.mark.parametrize("name", ITEMSIZE)
def test_every_dtype_is_kept_inside_objects(name: str) -> None:
    tensor = torch.arange(8 * ITEMSIZE[name], dtype=torch.uint8).remainder(2).view(torch_dtype(name))

    class Holder:
        state: Any = None

        def state_dict(self) -> Any:
            return {"t": tensor, "empty": tensor[:0], "scalar": tensor[0]}

        def load_state_dict(self, state: Any) -> None:
            self.state = state

    holder = Holder()
    load(save({"holder": holder}), {"holder": holder})
    for key, live in holder.state_dict().items():
        loaded = holder.state[key]
        assert (loaded.dtype, loaded.shape, raw(loaded)) == (live.dtype, live.shape, raw(live))


def views(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "conj": tensor.conj(),
        "conj transposed": tensor.mH,
        "imag of conj": tensor.conj().imag,
        "real": tensor.real,
        "transposed": tensor.T,
        "strided": tensor[:, ::2],
    }


@pytest.mark.parametrize("kind", views(torch.zeros(1, 1, dtype=torch.complex64)))
def test_lazy_and_strided_views_are_stored_and_loaded_as_what_they_show(kind: str) -> None:
    base = torch.complex(torch.arange(12.0), torch.arange(12.0) + 100).view(3, 4)
    live = views(base)[kind]
    expected = live.clone()
    checkpoint = save({"view": live})
    assert torch.equal(checkpoint.tensors["view"], expected)
    base.zero_()
    load(checkpoint, {"view": live})
    assert torch.equal(live, expected)
    assert base.abs().sum() > 0


def test_lazy_views_in_objects_are_resolved() -> None:
    value = torch.complex(torch.ones(2), torch.ones(2))
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state[model.weight]["history"] = [value.conj(), value.conj().imag]
    checkpoint = save({"model": model, "optimizer": optimizer})
    fresh = torch.optim.SGD(model.parameters())
    load(checkpoint, {"model": model, "optimizer": fresh})
    one, other = fresh.state[model.weight]["history"]
    assert torch.equal(one, value.conj())
    assert torch.equal(other, -torch.ones(2))


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(3)


REFUSED: list[tuple[torch.Tensor, str]] = [
    (torch.zeros(2, device="meta"), "meta device"),
    (nn.LazyLinear(2).weight, "not initialized yet"),
    (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantized"),
    (torch.eye(2).to_sparse(), "layout torch.sparse_coo"),
    (torch.eye(2).to_sparse_csr(), "layout torch.sparse_csr"),
    (torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), "nested"),
    (torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged), "nested"),
    (fake(), "FakeTensor"),
]


@pytest.mark.parametrize(("tensor", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_has_no_plain_bytes_is_refused_by_path(tensor: torch.Tensor, reason: str) -> None:
    module = nn.Module()
    module.register_buffer("b", tensor)
    places = {"tensor": tensor, "model": module}
    for (name, value), path in zip(places.items(), ("tensor", r"model\.b"), strict=True):
        with pytest.raises(StateError, match=rf"'{path}' .*{reason}"):
            LiveState({name: value}, rank=0, world=1).flatten()


class Labelled(torch.Tensor):
    """A subclass that is only a label on plain memory."""


def test_a_label_on_plain_memory_is_a_plain_tensor() -> None:
    tensor = torch.arange(3.0).as_subclass(Labelled)
    checkpoint = save({"tensor": tensor})
    assert type(checkpoint.tensors["tensor"]) is torch.Tensor
    expected = torch.arange(3.0)
    tensor.zero_()
    load(checkpoint, {"tensor": tensor})
    assert torch.equal(tensor.as_subclass(torch.Tensor), expected)


def test_an_expanded_tensor_is_saved_and_refused_at_load() -> None:
    tensor = torch.ones(1).expand(3)
    checkpoint = save({"tensor": tensor})
    with pytest.raises(StateError, match=r"'tensor' is expanded.*clone"):
        load(checkpoint, {"tensor": tensor})


def test_a_tensor_that_overlaps_itself_is_refused_at_load() -> None:
    tensor = torch.arange(10.0).as_strided((4, 4), (1, 1))
    checkpoint = save({"tensor": tensor})
    with pytest.raises(StateError, match=r"'tensor' is expanded, or overlaps itself .*clone"):
        load(checkpoint, {"tensor": tensor})


def cuts(base: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor, bool]]:
    """Two views of one (8, 12) tensor, and whether they share elements."""
    flat = base.view(-1)
    return {
        "a part and the whole": (flat, flat[2:5], True),
        "slices that overlap": (flat[:5], flat[4:9], True),
        "slices that touch": (flat[:5], flat[5:9], False),
        "columns": (base[:, :5], base[:, 5:], False),
        "columns that overlap": (base[:, :5], base[:, 4:], True),
        "later columns of earlier rows": (base[2:, :5], base[:4, 5:], False),
        "a column and a row": (base[:, 3], base[4], True),
        "a column and rows beside it": (base[:4, 3:4], base[4:], False),
        "odd and even": (flat[::2], flat[1::4], False),
        "strides that meet": (flat[::2], flat[::3], True),
        "transposed": (base[:, :4].T, base[:, 4:], False),
        "transposed and overlapping": (base[:, :4].T, base[:, 3:], True),
        "bytes of an element": (flat[:3], flat.view(torch.uint8)[11::4], True),
        "bytes behind it": (flat[:3], flat.view(torch.uint8)[12:], False),
        "a tie": (flat, flat, False),
    }


@pytest.mark.parametrize("kind", cuts(torch.zeros(8, 12)))
def test_tensors_that_are_partly_the_same_memory_are_refused_by_both_names(kind: str) -> None:
    one, other, overlap = cuts(torch.arange(96.0).view(8, 12))[kind]
    state = {"one": one, "other": other}
    checkpoint = save(state)
    if overlap:
        with pytest.raises(StateMismatchError, match=r"'one' and 'other' are partly|'other' and 'one' are partly"):
            load(checkpoint, state)
    else:
        load(checkpoint, state)


def test_a_dtype_without_a_name_is_refused_by_path() -> None:
    with pytest.raises(StateError, match=r"'tensor' has dtype torch\.bits8"):
        save({"tensor": torch.empty(2, dtype=torch.bits8)})


def test_a_dtype_of_another_torch_is_refused_by_name() -> None:
    with pytest.raises(StateError, match="has no dtype 'float3'"):
        torch_dtype("float3")


def test_empty_tensors_are_never_tied() -> None:
    empty = [torch.empty(0) for _ in range(3)]
    checkpoint = save(dict(zip("abc", empty, strict=True)))
    assert not checkpoint.aliases
    for one, other in itertools.pairwise(empty):
        assert one is not other
