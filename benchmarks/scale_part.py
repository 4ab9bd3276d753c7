"""One measurement of benchmarks/scale.py in a process of its own, so that its peak memory is its own."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarks.scale_layouts import Layout, Megatron, dense, fsdp, mixture, moe
from dscheck.commit import put_plan
from dscheck.commit.stored import StoredPlan
from dscheck.layout.region import Region
from dscheck.load.needs import needs_of
from dscheck.load.reads import reads_of
from dscheck.manifest.arrow import encode_plan
from dscheck.manifest.record import Digest
from dscheck.ranks.message import pack
from dscheck.save.claims import RankClaims
from dscheck.save.merge import merge
from dscheck.storage.local import LocalStorage

T = TypeVar("T")

BLOCK_BYTES = 256 << 10
SAMPLED = 64
NODE = 8


def layouts(tiny: bool) -> dict[str, Layout]:
    """The jobs that save, and those that only load, by name."""
    if tiny:
        small, experts, ranks = dense(4, 64, 224, 16, 512), mixture(2, 64, 16, 8, 512), 32
        return {
            "fsdp": fsdp(ranks, small),
            "fsdp_half": fsdp(ranks // 2, small),
            "megatron": Megatron(4, 2, 4, 4, small),
            "megatron_half": Megatron(4, 2, 2, 4, small),
            "moe": moe(ranks, 4, experts),
            "moe_half": moe(ranks // 2, 4, experts),
        }
    large, experts, ranks = dense(126, 16384, 53248, 1024, 128256), mixture(58, 7168, 2048, 256, 129280), 16384
    return {
        "fsdp": fsdp(ranks, large),
        "fsdp_half": fsdp(ranks // 2, large),
        "fsdp_4096": fsdp(ranks // 4, large),
        "fsdp_1024": fsdp(ranks // 16, large),
        "megatron": Megatron(8, 16, 128, 126, large),
        "megatron_half": Megatron(8, 16, 64, 126, large),
        "moe": moe(ranks, 64, experts),
        "moe_half": moe(ranks // 2, 64, experts),
    }


def timed(act: Callable[[], T]) -> tuple[T, float]:
    """What `act` returns, and the CPU seconds that it took: other work on the machine is not its own."""
    began = time.process_time()
    found = act()
    return found, time.process_time() - began


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def message(claims: RankClaims, full: bool) -> bytes:
    """What a rank posts first in a save, apart from samples."""
    post = {"step": 1, "busy": False, "digest": "0" * 64, "plan": "0" * 64, "full": full, "samples": []}
    return pack(post | {"claims": claims.encode().decode() if full else None})


def build(layout: Layout, folder: Path) -> dict[str, Any]:
    """The coordinator's work at a first save, and what it stores."""
    before = peak_bytes()
    claims, claims_s = timed(lambda: [layout.claims(rank) for rank in range(layout.ranks)])
    some = claims[:: max(1, layout.ranks // SAMPLED)]
    posts, encode_s = timed(lambda: [message(each, True) for each in some])
    texts = [each.encode() for each in some]
    _, decode_s = timed(lambda: [RankClaims.decode(text, layout.ranks) for text in texts])
    claimed = peak_bytes()
    merged, merge_s = timed(partial(merge, claims, BLOCK_BYTES))
    claims.clear()
    plan = merged.plan
    untiled, proof_s = timed(lambda: list(plan.untiled()))
    assert not untiled
    _, validate_s = timed(plan.validate)
    encoded, write_s = timed(lambda: encode_plan(plan))
    storage = LocalStorage(folder)
    put_plan(storage, 1, encoded)
    return {
        "title": layout.title,
        "ranks": layout.ranks,
        "tensors": len(plan.tensors),
        "fragments": len(plan.fragments),
        "generated_s": claims_s,
        "claims_message_bytes": sum(map(len, posts)) / len(posts),
        "steady_message_bytes": len(message(some[0], False)),
        "claims_encode_s": encode_s / len(some),
        "claims_decode_s": decode_s / len(some),
        "merge_s": merge_s,
        "proof_s": proof_s,
        "validate_s": validate_s,
        "encode_s": write_s - validate_s,
        "plan_bytes": len(encoded.data),
        "head": asdict(encoded.head),
        "peak_bytes": peak_bytes() - before,
        "claims_peak_bytes": claimed - before,
    }


def wants(layout: Layout, rank: int, index: dict[str, int]) -> list[tuple[int, Region, None]]:
    """The regions that a rank of this layout loads."""
    claims = layout.claims(rank)
    edges = claims.first.tolist()
    return [
        (index[row.name], claims.boxes.region(at), None)
        for row, begin, end in zip(claims.tensors, edges, edges[1:], strict=False)
        for at in range(begin, end)
    ]


def load(layout: Layout, folder: Path, head: Digest) -> dict[str, Any]:
    """What one rank in the middle of the job does before the first byte of a tensor; the plan is in the page cache."""
    storage = LocalStorage(folder)
    before = peak_bytes()
    plan, open_s = timed(lambda: StoredPlan(storage, 1, head))
    index, index_s = timed(plan.index)
    rank = layout.ranks // 2 + 1
    wanted = wants(layout, rank, index)
    needs, needs_s = timed(lambda: needs_of(plan, wanted))
    reads, reads_s = timed(lambda: reads_of(needs))
    peak = peak_bytes() - before
    nodes = [layout.ranks // NODE * part // 4 for part in range(4)]
    of_nodes = [_node_bytes(plan, layout, node, index) for node in nodes]
    return {
        "title": layout.title,
        "ranks": layout.ranks,
        "wanted": len(wanted),
        "needs": len(needs),
        "reads": len(reads),
        "files": len(np.unique(reads.file)),
        "open_s": open_s + index_s,
        "plan_s": needs_s,
        "reads_s": reads_s,
        "index_bytes": plan.bytes_read,
        "peak_bytes": peak,
        "node_index_bytes": sum(of_nodes) / len(of_nodes),
        "all_index_bytes": sum(of_nodes) / len(of_nodes) * -(-layout.ranks // NODE),
    }


def _node_bytes(plan: StoredPlan, layout: Layout, node: int, index: dict[str, int]) -> int:
    """The index that the ranks of one node need together: the head, and each batch once."""
    directory, batches = plan.head.directory, set[int]()
    for rank in range(node * NODE, min((node + 1) * NODE, layout.ranks)):
        wanted = [(tensor, region) for tensor, region, _ in wants(layout, rank, index)]
        batches.update(directory.find_each(wanted)[0].tolist())
    return plan.size - directory.nbytes + int(directory.size[sorted(batches)].sum())


def main(kind: str, name: str, folder: str, tiny: str, *head: str) -> None:
    layout = layouts(tiny == "tiny")[name]
    if kind == "build":
        found = build(layout, Path(folder))
    else:
        found = load(layout, Path(folder), Digest(int(head[0]), head[1]))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
