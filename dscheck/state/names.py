"""Global parameter names: without the components that wrappers add."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

# By name, so that none of these modules is imported for it (torch._dynamo alone costs over a second).
_WRAPPED = {
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper": "_checkpoint_wrapped_module",
}


def _wrapped_in(module: nn.Module) -> str | None:
    """The attribute under which a wrapper keeps the module that it wraps; None for any other module."""
    kind: Any = type(module)
    return _wrapped_by(kind)


@cache
def _wrapped_by(kind: Any) -> str | None:
    for base in kind.__mro__:
        if attribute := _WRAPPED.get(f"{base.__module__}.{base.__qualname__}"):
            return attribute
    return None


class Names:
    """The clean names of what lies in `module`: every wrapper component is dropped, a user's own "module." is not.

    >>> Names(nn.DataParallel(nn.Sequential(nn.Linear(2, 2)))).clean("module.0.weight")
    '0.weight'
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._any = any(_wrapped_in(child) for child in module.modules())
        self._prefixes: dict[str, str] = {}

    def clean(self, key: str) -> str:
        """The clean form of a state dict's key, whether or not the wrapper's own hooks have cleaned it before."""
        if not self._any:
            return key
        prefix, _, last = key.rpartition(".")
        if prefix not in self._prefixes:
            self._prefixes[prefix] = self._clean_prefix(prefix)
        clean = self._prefixes[prefix]
        return f"{clean}.{last}" if clean else last

    def _clean_prefix(self, prefix: str) -> str:
        at: nn.Module | None = self._module
        kept = []
        for component in prefix.split(".") if prefix else []:
            at, dropped = _descend(at, component)
            if not dropped:
                kept.append(component)
        return ".".join(kept)


def _descend(at: nn.Module | None, component: str) -> tuple[nn.Module | None, bool]:
    """The child called `component`, through wrappers that the key leaves out, and whether it is a wrapped one."""
    while at is not None and (wrapped := _wrapped_in(at)):
        inner = at._modules.get(wrapped)
        if component == wrapped:
            return inner, True
        at = inner
    return (None if at is None else at._modules.get(component)), False
