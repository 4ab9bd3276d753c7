"""What codecs make of the state of a trained model: ratios and rates, and saves by "auto" against "none".

python -m benchmarks.demo_train RUN --steps 400 --save-every 100   # once: what is trained
python -m benchmarks.codecs RUN
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.demo_train import build
from benchmarks.launch import REPOSITORY
from benchmarks.machine import describe, versions
from benchmarks.stall_targets import Target, at_most
from dscheck import Checkpointer
from dscheck.codec.choice import codec_of
from dscheck.codec.decode import Decoder
from dscheck.codec.encode import Encoded, Encoder
from dscheck.config import CodecName
from dscheck.manifest.blocks import Codec
from dscheck.storage import LocalStorage, MemoryStorage, Storage
from dscheck.testing import Faulty

RESULTS = REPOSITORY / "benchmarks" / "results"
MIB = 1 << 20
BLOCK_BYTES = 256 << 10
NAMES: tuple[CodecName, ...] = ("zstd", "shuffle-zstd")
AUTO_OF_NONE = 1.03
WARM_SAVES = 4
"""Of each run, not counted: "auto" measures two, and tries."""


class WrongBytesError(Exception):
    """A block came back changed."""


def trained(run: Path) -> tuple[int, dict[str, list[torch.Tensor]]]:
    """The step, and the tensors of each kind, that `run` came to."""
    model, _, _ = build(1, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    with Checkpointer(run, {"model": model, "optimizer": optimizer}) as ckpt:
        step = ckpt.load(strict=False)
    if step is None:
        raise FileNotFoundError(f"no step in '{run}': train first, with `python -m benchmarks.demo_train {run}`")
    weights = [parameter.detach() for parameter in model.parameters()]
    moments = {key: [optimizer.state[p][key] for p in model.parameters()] for key in ("exp_avg", "exp_avg_sq")}
    return step, {"bf16 weights": [w.bfloat16() for w in weights], "fp32 weights": weights} | {
        f"fp32 Adam {key}": tensors for key, tensors in moments.items()
    }


def repeated(tensors: list[torch.Tensor], nbytes: int) -> torch.Tensor:
    """About so many bytes of them, again and again, which no block sees: each is compressed alone."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    times = -(-nbytes // (flat.numel() * flat.itemsize))
    return flat.repeat(times)[: nbytes // flat.itemsize]


def rates(kinds: dict[str, list[torch.Tensor]], nbytes: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Each codec on each kind, on one thread. Raises WrongBytesError."""
    for kind, tensors in kinds.items():
        raw = repeated(tensors, nbytes).view(torch.uint8).numpy()
        dtype = str(tensors[0].dtype).removeprefix("torch.")
        for name in NAMES:
            codec, encoder = codec_of(name, dtype), Encoder(BLOCK_BYTES, threads=1)
            encoded, encode_s = fastest(lambda: encoder.encode(raw.data, codec), rounds)  # noqa: B023
            out = np.empty_like(raw)
            _, decode_s = fastest(lambda: decode(encoded, out), rounds)  # noqa: B023
            if out.tobytes() != raw.tobytes():
                raise WrongBytesError(f"{kind} by {name}")
            yield {
                "kind": kind,
                "codec": name,
                "ratio": raw.nbytes / len(encoded.data),
                "encode_bytes_s": raw.nbytes / encode_s,
                "decode_bytes_s": raw.nbytes / decode_s,
            }


def decode(encoded: Encoded, out: np.ndarray) -> None:
    decoder, stored, at = Decoder(), memoryview(encoded.data), 0
    for number, (size, codec) in enumerate(zip(encoded.sizes.tolist(), encoded.codecs.tolist(), strict=True)):
        decoder.decode(stored[at : at + size], Codec(codec), out[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES])
        at += size


def fastest(call: Callable[[], Any], rounds: int) -> tuple[Any, float]:
    """What it returns, and the seconds of the fastest of some calls: others may want the core."""
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        found = call()
        taken.append(time.perf_counter() - began)
    return found, min(taken)


def saves(
    kinds: dict[str, list[torch.Tensor]], nbytes: int, rounds: int, storage_of: Callable[[str], Storage]
) -> dict[str, Any]:
    """Seconds of a committed save of weights in bf16 and both moments, "auto" and "none" in turns."""
    shares = {"bf16 weights": 1, "fp32 Adam exp_avg": 2, "fp32 Adam exp_avg_sq": 2}
    parts = {kind: repeated(kinds[kind], share * nbytes // 5) for kind, share in shares.items()}
    found: dict[str, list[float]] = {"none": [], "auto": []}
    open_ = {name: Checkpointer(storage_of(name), {"state": parts}, codec=name) for name in found}
    for step in range(1, WARM_SAVES + rounds + 1):
        for name, ckpt in open_.items():
            for tensor in parts.values():
                tensor[:1] += 1  # not the very bytes of the last time
            began = time.perf_counter()
            ckpt.save(step).wait()
            found[name].append(time.perf_counter() - began)
    for ckpt in open_.values():
        ckpt.close()
    seconds = {name: statistics.median(taken[WARM_SAVES:]) for name, taken in found.items()}
    return {"bytes": sum(tensor.nbytes for tensor in parts.values()), "seconds": seconds, "all_s": found}


def on_disk(folder: Path) -> Callable[[str], Storage]:
    return lambda name: LocalStorage(str(folder / name))


def behind(bytes_s: float) -> Callable[[str], Storage]:
    """A storage that takes so many bytes a second."""

    def slowly(operation: Any, proceed: Callable[[Any], Any]) -> Any:
        if operation.name == "write":
            time.sleep(operation.nbytes / bytes_s)
        return proceed(operation)

    return lambda name: Faulty(MemoryStorage(uuid.uuid4().hex), slowly)


def targets(links: list[dict[str, Any]]) -> Iterator[Target]:
    for row in links:
        part = row["seconds"]["auto"] / row["seconds"]["none"]
        yield at_most(f"a save by auto, {row['link']}, of one by none", part, AUTO_OF_NONE)


def page(result: dict[str, Any]) -> str:
    machine = result["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        "# Codecs on the state of a trained model",
        "",
        f"`{result['command']}`, a byte-level GPT after {result['step']} steps",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['disk']}; {packages}. Rates: raw bytes, of one thread.",
        "",
        "| state | codec | ratio | encode, GB/s | decode, GB/s |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['kind']} | {row['codec']} | {row['ratio']:.3f} | {row['encode_bytes_s'] / 1e9:.2f} "
        f"| {row['decode_bytes_s'] / 1e9:.2f} |"
        for row in result["rates"]
    ]
    lines += ["", "| storage | state, MB | none, s | auto, s | auto of none |", "| --- | ---: | ---: | ---: | ---: |"]
    for row in result["links"]:
        none, auto = row["seconds"]["none"], row["seconds"]["auto"]
        lines.append(f"| {row['link']} | {row['bytes'] / 1e6:.0f} | {none:.3f} | {auto:.3f} | {auto / none:.2f} |")
    lines += ["", "| what | wanted | measured | verdict |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {' | '.join(target)} |" for target in targets(result["links"])]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, help="what benchmarks.demo_train wrote")
    parser.add_argument("--mb", type=int, default=32, help="MiB of each kind of state to encode")
    parser.add_argument("--save-mb", type=int, default=256, help="MiB of state to save on the local disk")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "build", help="where saves go, and are removed")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of codecs.json and codecs.md")
    given = parser.parse_args()
    step, kinds = trained(given.run)
    folder = given.folder / f"codecs-{uuid.uuid4().hex}"
    try:
        found = list(rates(kinds, given.mb * MIB, 3))
        small = given.save_mb * MIB // 8
        links = [
            {"link": "the local disk", **saves(kinds, given.save_mb * MIB, given.rounds, on_disk(folder))},
            {"link": "a link of 200 MB/s", **saves(kinds, small, 3, behind(200e6))},
            {"link": "a link of 50 MB/s", **saves(kinds, small, 3, behind(50e6))},
        ]
    except WrongBytesError as error:
        print(f"benchmarks.codecs failed: {error} came back changed", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result = {
        "command": f"python -m benchmarks.codecs RUN --mb {given.mb} --save-mb {given.save_mb} --rounds {given.rounds}",
        "machine": describe(given.folder),
        "versions": versions("dscheck", "torch", "zstandard"),
        "step": step,
        "rates": found,
        "links": links,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "codecs.json").write_text(json.dumps(result, indent=1) + "\n")
    (given.out / "codecs.md").write_text(page(result))
    print(page(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
