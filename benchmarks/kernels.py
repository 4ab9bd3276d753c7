"""The native loops on one core: CRC32C, and strided boxes against memcpy, each checked against a slow twin.

python -m benchmarks.kernels
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.launch import REPOSITORY
from benchmarks.machine import describe, versions
from benchmarks.stall_targets import Target, at_least
from dscheck.native import crc32c, crc32c_blocks, crc32c_is_accelerated, place

RESULTS = REPOSITORY / "benchmarks" / "results"
KIB, MIB = 1 << 10, 1 << 20
BLOCKS = (4 * KIB, 64 * KIB, 256 * KIB, 1 * MIB, 4 * MIB)
ROWS = (16, 64, 256, 1 * KIB, 4 * KIB, 64 * KIB)
CRC_GB_S, CRC_FROM_BYTES = 10.0, 64 * KIB
SCATTER_OF_MEMCPY, SCATTER_FROM_BYTES = 0.7, 64
IN_CACHE_BYTES, LINE_BYTES = 256 * KIB, 64
LEAST_S = 0.02
"""Of one measurement: short calls are repeated within it."""

Bytes = NDArray[np.uint8]


class WrongBytesError(Exception):
    """A kernel and its slow twin differ."""


def slow_crc32c(data: bytes) -> int:
    """RFC 3720, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def bytes_a_second(nbytes: int, call: Callable[[], Any]) -> float:
    """In this thread's own time: others may want the core too."""
    calls, began = 0, time.thread_time()
    while (taken := time.thread_time() - began) < LEAST_S:
        call()
        calls += 1
    return calls * nbytes / taken


def checksums(nbytes: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Whole blocks, from memory and from the cache. Raises WrongBytesError."""
    data = np.random.default_rng(0).integers(0, 256, nbytes, dtype=np.uint8)
    for size in (0, 1, 7, 8, 767, 768, 4097):
        if crc32c(data[:size]) != slow_crc32c(data[:size].tobytes()):
            raise WrongBytesError(f"crc32c of {size} bytes")
    for block in BLOCKS:
        sums = crc32c_blocks(data, block)
        if sums[-1] != crc32c(data[(len(sums) - 1) * block :]):
            raise WrongBytesError(f"crc32c_blocks of {block} bytes")
        for where, part in (("memory", data), ("cache", data[:IN_CACHE_BYTES])):
            crc = partial(crc32c_blocks, part, block)
            rates = [bytes_a_second(part.nbytes, crc) for _ in range(rounds)]
            yield {"block_bytes": block, "from": where, "bytes_s": statistics.median(rates)}


def boxes(nbytes: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Rows taken out of rows twice as long, and put into such: what a load by other columns does, and one that wants
    columns in their place. Raises WrongBytesError.
    """
    data = np.random.default_rng(1).integers(0, 256, 2 * nbytes, dtype=np.uint8)
    target = _aligned(2 * nbytes)
    memcpy = partial(np.copyto, target[:nbytes], data[:nbytes])
    for row in ROWS:
        count = nbytes // row
        wide, narrow = (count, 2 * row), (count, row)
        for what, source, into in (("gather", wide, narrow), ("spread", narrow, wide)):
            axes = [(count, source[1], into[1]), (row, 1, 1)]
            box = partial(place, data, MIB, [], [(0, target.ctypes.data, 1, axes)])
            # Side by side: others may want the memory too.
            pairs = [(bytes_a_second(count * row, box), bytes_a_second(nbytes, memcpy)) for _ in range(rounds)]
            target[:] = 0
            box()
            expected = np.zeros_like(target)
            _rows(expected, into)[:, :row] = _rows(data, source)[:, :row]
            if not np.array_equal(target, expected):
                raise WrongBytesError(f"{what} of rows of {row} bytes")
            rate, whole = (statistics.median(rates) for rates in zip(*pairs, strict=True))
            part = statistics.median(one / other for one, other in pairs)
            yield {"what": what, "row_bytes": row, "bytes_s": rate, "memcpy_bytes_s": whole, "of_memcpy": part}


def _aligned(nbytes: int) -> Bytes:
    """Zeros where a line of the cache begins, as torch allocates tensors."""
    around = np.zeros(nbytes + LINE_BYTES, np.uint8)
    return around[-around.ctypes.data % LINE_BYTES :][:nbytes]


def _rows(flat: Bytes, shape: tuple[int, int]) -> Bytes:
    return flat[: shape[0] * shape[1]].reshape(shape)


def targets(crcs: list[dict[str, Any]], scatters: list[dict[str, Any]]) -> Iterator[Target]:
    """The slowest of each kind against what is wanted of it."""
    for where in ("memory", "cache"):
        rates = [row["bytes_s"] for row in crcs if row["from"] == where and row["block_bytes"] >= CRC_FROM_BYTES]
        what = f"CRC32C from {where}, blocks of {CRC_FROM_BYTES // KIB} KiB and more, slowest"
        yield at_least(what, min(rates) / 1e9, CRC_GB_S, " GB/s")
    long = [row["of_memcpy"] for row in scatters if row["row_bytes"] >= SCATTER_FROM_BYTES]
    yield at_least(f"rows of {SCATTER_FROM_BYTES} bytes and more, slowest, of memcpy", min(long), SCATTER_OF_MEMCPY)


def page(result: dict[str, Any]) -> str:
    machine = result["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    means = "CRC instructions" if result["accelerated"] else "tables"
    lines = [
        "# CRC32C and strided boxes on one core",
        "",
        f"`{result['command']}`",
        "",
        f"{machine['cpu']}; {packages}; CRC32C by {means}. Medians of the thread's own time, each equal to its twin.",
        "",
        "| CRC32C, block | from memory, GB/s | from the cache, GB/s |",
        "| --- | ---: | ---: |",
    ]
    for block in BLOCKS:
        rates = {row["from"]: row["bytes_s"] / 1e9 for row in result["crc32c"] if row["block_bytes"] == block}
        lines.append(f"| {block // KIB} KiB | {rates['memory']:.1f} | {rates['cache']:.1f} |")
    lines += ["", "| box | GB/s | memcpy, GB/s | of memcpy |", "| --- | ---: | ---: | ---: |"]
    lines += [
        f"| {row['what']}, rows of {row['row_bytes']} bytes | {row['bytes_s'] / 1e9:.1f} "
        f"| {row['memcpy_bytes_s'] / 1e9:.1f} | {row['of_memcpy']:.2f} |"
        for row in result["boxes"]
    ]
    lines += ["", "| what | wanted | measured | verdict |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {' | '.join(target)} |" for target in targets(result["crc32c"], result["boxes"])]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--mb", type=int, default=256, help="MiB of memory: more than the caches hold")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of kernels.json and kernels.md")
    given = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    try:
        crcs = list(checksums(given.mb * MIB, given.rounds))
        scatters = list(boxes(given.mb * MIB // 2, given.rounds))
    except WrongBytesError as error:
        print(f"benchmarks.kernels failed: {error} differs from its slow twin", file=sys.stderr)
        return 1
    result = {
        "command": f"python -m benchmarks.kernels --mb {given.mb} --rounds {given.rounds}",
        "machine": describe(REPOSITORY),
        "versions": versions("dscheck", "numpy"),
        "accelerated": crc32c_is_accelerated(),
        "crc32c": crcs,
        "boxes": scatters,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "kernels.json").write_text(json.dumps(result, indent=1) + "\n")
    (given.out / "kernels.md").write_text(page(result))
    print(page(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
