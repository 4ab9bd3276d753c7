"""One part of benchmarks.stall in a process of its own: what fails in it, or hangs, costs no other part its rows.

python -m benchmarks.stall_part PART OPTIONS      options: JSON, as benchmarks.stall makes them
"""

from __future__ import annotations

import sys
from importlib import import_module

import torch

from benchmarks.stall_bench import Bench, Options

PARTS = {
    "limits": "benchmarks.stall_rivals:limits",
    "ours": "benchmarks.stall_ours:every_ten_steps",
    "often": "benchmarks.stall_often:every_step",
    "soak": "benchmarks.stall_soak:soak",
    "rivals": "benchmarks.stall_rivals:rivals",
}


def main(part: str, given: str) -> None:
    options = Options.from_json(given)
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    bench = Bench(options, part, device)
    bench.say("begins")
    module, _, function = PARTS[part].partition(":")
    getattr(import_module(module), function)(bench)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
