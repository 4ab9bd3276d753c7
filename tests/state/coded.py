"""A small wrapper subclass in the manner of quantized tensors: 8-bit codes, a scale for each block, metadata."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map_only

BLOCK = 4


class Coded(torch.Tensor):
    """Values in steps of their block's scale. Steps change its inner tensors in place."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor, meta: Any) -> Coded:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[no-any-return]
            cls, codes.shape, dtype=torch.float32, device=codes.device
        )

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, meta: Any) -> None:
        self.codes, self.scale, self.meta = codes, scale, meta

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scale"], self.meta

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, torch.Tensor], meta: Any, size: Any, stride: Any) -> Coded:
        return cls(inner["codes"], inner["scale"], meta)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Aliases and copies stay coded; all other arithmetic is on the values."""
        aten = torch.ops.aten
        if func in (aten.detach.default, aten.clone.default, aten.view.default, aten.alias.default):
            one = args[0]
            return cls(
                func(one.codes, *args[1:]), one.scale.clone() if func is aten.clone.default else one.scale, one.meta
            )
        return func(*tree_map_only(Coded, Coded.values, args), **tree_map_only(Coded, Coded.values, kwargs or {}))

    def values(self) -> torch.Tensor:
        return (self.codes.float().view(-1, BLOCK) * self.scale.view(-1, 1)).view(self.codes.shape)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Coded({list(self.shape)})"


def coded(*shape: int, meta: Any = (True, torch.float32), seed: int = 0) -> Coded:
    """Random codes and scales."""
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)
    return Coded(codes, torch.rand(codes.numel() // BLOCK, generator=random), meta)


class CodedMomentum(torch.optim.Optimizer):
    """SGD whose momentum is coded, made at the first step."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state["momentum"] = coded(*parameter.shape)
            state["momentum"].codes.add_(7)
            state["momentum"].scale.mul_(1.5)
            parameter.sub_(state["momentum"].values(), alpha=0.1)
