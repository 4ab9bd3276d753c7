"""What planning costs at the size of the largest jobs, without their data: `python -m benchmarks.scale`.

Claims of up to 16,384 ranks go through the product's own merge, proof, encoding and load plan, each in a process of its
own; then many ranks arrive and commit over one store.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import commit, describe, versions
from benchmarks.scale_page import page

RESULTS = Path(__file__).parent / "results"
LIMIT_S = 3600.0

SAVED = {
    "fsdp": ("fsdp", "fsdp_half", "megatron"),
    "megatron": ("megatron", "megatron_half", "fsdp"),
    "moe": ("moe", "moe_half"),
}
"""Which layouts save, and which then load what they saved."""

CURVE = ("fsdp_1024", "fsdp_4096")
"""The same model on fewer ranks."""


def run(module: str, *arguments: object) -> dict[str, Any]:
    """What a part of the benchmark printed last. Raises CalledProcessError, TimeoutExpired."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=LIMIT_S, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{module} {' '.join(map(str, arguments[:2]))}", file=sys.stderr, flush=True)
    return found


def saved(name: str, loads: tuple[str, ...], tiny: bool, work: Path) -> dict[str, Any]:
    """One layout's plan, and what others load of it."""
    size = "tiny" if tiny else "large"
    with tempfile.TemporaryDirectory(dir=work) as folder:
        built = run("benchmarks.scale_part", "build", name, folder, size)
        head = built.pop("head")
        loaded = [
            run("benchmarks.scale_part", "load", other, folder, size, head["size"], head["sha256"]) for other in loads
        ]
    return built | {"head_bytes": head["size"], "loads": loaded}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="32 ranks and a few thousand fragments, for tests")
    parser.add_argument("--ranks", type=int, nargs="*", default=[64, 256, 1024], help="of the arrivals over a store")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where plans lie meanwhile")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of scale.json and scale.md")
    parser.add_argument("--plans-only", action="store_true", help="keep what --out says of the curve and the store")
    given = parser.parse_args()
    now = commit()
    result: dict[str, Any] = json.loads((given.out / "scale.json").read_text()) if given.plans_only else {}
    result |= {
        "command": "python -m benchmarks.scale" + (" --tiny" if given.tiny else ""),
        "machine": describe(given.dir),
        "versions": versions("dscheck", "torch", "numpy", "pyarrow", "zstandard"),
        "saved": [saved(name, loads, given.tiny, given.dir) for name, loads in SAVED.items()],
    }
    result["commits"] = result.get("commits", {}) | {"saved": now}
    if not given.plans_only:
        result["curve"] = [] if given.tiny else [saved(name, (), False, given.dir) for name in CURVE]
        result["store"] = [run("benchmarks.scale_store", ranks) for ranks in given.ranks]
        result["commits"] |= {"curve": now, "store": now}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "scale.json").write_text(json.dumps(result, indent=1) + "\n")
    text = page(result)
    (given.out / "scale.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
