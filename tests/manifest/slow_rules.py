"""The rules of a plan, row by row and with nothing but Python's ints: the oracle for manifest/rules.py."""

from __future__ import annotations

import math

from dscheck.manifest.dtypes import ITEMSIZE
from dscheck.manifest.fragments import Fragment
from dscheck.manifest.plan import Plan


def holds(plan: Plan) -> bool:
    """Whether every row of the plan agrees with all others, as docs/format.md F34 to F59 have it."""
    return (
        1 <= plan.block_bytes <= 2**30
        and _tensors_hold(plan)
        and all(row.rank == i for i, row in enumerate(plan.ranks))
        and all(len({name for name, _ in row.mesh}) == len(row.mesh) for row in plan.ranks)
        and all(0 <= at < 2**31 for row in plan.ranks for _, at in row.mesh)
        and all(members and sorted(set(members)) == list(members) for members in plan.holders)
        and all(0 <= rank < len(plan.ranks) for members in plan.holders for rank in members)
        and all(_fragment_holds(plan, fragment) for fragment in plan.fragments)
        and _order_holds(plan)
        and all(_file_holds(plan, row.rank) for row in plan.ranks)
    )


def _tensors_hold(plan: Plan) -> bool:
    names = [name for tensor in plan.tensors for name in (tensor.name, *tensor.aliases)]
    first = [tensor.name for tensor in plan.tensors]
    return (
        all(names)
        and len(set(names)) == len(names)
        and first == sorted(first)
        and all(list(tensor.aliases) == sorted(tensor.aliases) for tensor in plan.tensors)
        and all(tensor.dtype in ITEMSIZE and len(tensor.shape) <= 64 for tensor in plan.tensors)
        and all(0 <= size < 2**63 for tensor in plan.tensors for size in tensor.shape)
        and all(math.prod(n for n in t.shape if n) * ITEMSIZE[t.dtype] < 2**63 for t in plan.tensors)
    )


def _fragment_holds(plan: Plan, f: Fragment) -> bool:
    if not (0 <= f.tensor < len(plan.tensors) and 0 <= f.holders < len(plan.holders)):
        return False
    tensor = plan.tensors[f.tensor]
    return (
        f.writer in plan.holders[f.holders]
        and f.region.ndim == len(tensor.shape)
        and all(a < b <= n for a, b, n in zip(f.region.start, f.region.stop, tensor.shape, strict=True))
        and f.nbytes == math.prod(f.region.shape) * ITEMSIZE[tensor.dtype]
        and f.offset >= 0
        and f.offset % (4096 if f.nbytes >= 1 << 20 else 64) == 0
        and f.offset + f.nbytes < 2**63
    )


def _order_holds(plan: Plan) -> bool:
    keys = [(f.tensor, f.region.start) for f in plan.fragments]
    return keys == sorted(keys) and len(set(keys)) == len(keys)


def _file_holds(plan: Plan, writer: int) -> bool:
    end = blocks = 0
    for f in sorted((f for f in plan.fragments if f.writer == writer), key=lambda f: f.offset):
        if f.offset < end or f.first_block != blocks:
            return False
        end, blocks = f.offset + f.nbytes, blocks + math.ceil(f.nbytes / plan.block_bytes)
    return True
