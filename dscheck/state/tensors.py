"""What of torch's tensors can be stored: plain memory of a known element type, or a refusal by path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dscheck.errors import StateError
from dscheck.manifest.dtypes import ITEMSIZE

_BY_NAME = {name: getattr(torch, name) for name in ITEMSIZE if hasattr(torch, name)}
_BY_DTYPE = {dtype: name for name, dtype in _BY_NAME.items()}


def dtype_name(dtype: torch.dtype, path: str) -> str:
    """The name of an element type in a checkpoint. Raises StateError when it has none (quantized types, 4-bit ints)."""
    if dtype not in _BY_DTYPE:
        raise StateError(f"tensor '{path}' has dtype {dtype}, which a checkpoint cannot hold: cast it first", path=path)
    return _BY_DTYPE[dtype]


def torch_dtype(name: str) -> torch.dtype:
    """The element type called `name` in a checkpoint. Raises StateError when this version of torch does not have it."""
    if name not in _BY_NAME:
        raise StateError(f"torch {torch.__version__} has no dtype '{name}': load with a version that has it", path=name)
    dtype: torch.dtype = _BY_NAME[name]
    return dtype


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's memory of a tensor: the local one of a DTensor, whatever its placements."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether its values lie in other tensors, which `__tensor_flatten__` names. A DTensor or nested tensor is none."""
    kind = type(tensor)
    if kind is torch.Tensor or kind is torch.nn.Parameter or isinstance(tensor, DTensor):
        return False
    return is_traceable_wrapper_subclass(tensor) and not tensor.is_nested


def plain_locals(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors with bytes of their own that a tensor consists of on this rank: one, or those inside a wrapper."""
    local: Any = local_of(tensor)
    if not is_wrapper(local):
        yield local
        return
    for name in local.__tensor_flatten__()[0]:
        yield from plain_locals(getattr(local, name))


def refuse_unstorable(tensor: torch.Tensor, path: str) -> None:
    """Raise StateError, naming `path`, for what has no plain bytes of its own. A DTensor has its local tensor's."""
    if reason := _unstorable(tensor):
        raise StateError(f"tensor '{path}' {reason}", path=path)


def _unstorable(tensor: torch.Tensor) -> str | None:
    if isinstance(tensor, DTensor) or _is_common(tensor):
        return None
    if torch.nn.parameter.is_lazy(tensor):
        return "is not initialized yet: run a forward pass, or give the layer its sizes, before it is saved or loaded"
    if tensor.device.type == "meta":
        return "lies on the meta device and has no bytes: materialize it with to_empty() first"
    if tensor.is_quantized:
        return f"is quantized ({tensor.dtype}): dequantize it, or store its int_repr() and scale"
    if tensor.is_nested:
        return "is nested: store its values() and offsets()"
    if tensor.layout != torch.strided:
        return f"has layout {tensor.layout}: store its indices and values, or a dense copy"
    if is_traceable_wrapper_subclass(tensor) or (tensor.numel() and not _has_storage(tensor)):
        return (
            f"is a {type(tensor).__name__}, which wraps other tensors: with __tensor_flatten__ it can be a parameter, "
            "a buffer, or in an optimizer's state; else store the tensors in it"
        )
    return None


def _is_common(tensor: torch.Tensor) -> bool:
    """Whether it is one of nearly all tensors, which need no further questions: they are asked thousands of times."""
    kind = type(tensor)
    if kind is not torch.Tensor and kind is not torch.nn.Parameter:
        return False
    special = tensor.is_meta or tensor.is_quantized or tensor.is_nested or tensor.layout is not torch.strided
    return not special and (tensor.data_ptr() != 0 or not tensor.numel())


def _has_storage(tensor: torch.Tensor) -> bool:
    try:
        return tensor.data_ptr() != 0
    except RuntimeError:  # fake and functional tensors
        return False


def alias(tensor: torch.Tensor) -> torch.Tensor:
    """A detached view of the same memory, safe to hold: it keeps the old bytes after `p.data = other`.

    A lazily conjugated or negated view has no memory that holds its values: such a one comes back as a copy.
    """
    return plain(tensor.detach()).resolve_conj().resolve_neg()


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory without a subclass that is only a label (Parameter, Buffer and the like)."""
    return tensor if type(tensor) is torch.Tensor else tensor.as_subclass(torch.Tensor)


def is_lazy_view(tensor: torch.Tensor) -> bool:
    """Whether its values differ from its bytes: it can be read through a copy only, and be written only as a whole."""
    return tensor.is_conj() or tensor.is_neg()


def memory_key(tensor: torch.Tensor) -> Any:
    """Equal for tensors that are the same elements of the same memory. An empty tensor is only itself."""
    if not tensor.numel():
        return id(tensor)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), is_lazy_view(tensor))
