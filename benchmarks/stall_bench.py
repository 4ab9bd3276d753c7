"""What every part of benchmarks.stall runs with: options, shapes, a place to save to, and rows that are not lost."""

from __future__ import annotations

import gc
import json
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpt import Shape
from benchmarks.stall_cost import Method, measure
from benchmarks.stall_job import LARGE, MIDDLE, TINY, Training, fitting_batch

MOST_ERROR = 300
# A save that hangs is to fail before its part is ended from outside.
TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Options:
    """device: "cuda" or "cpu". tiny: shapes that take seconds on a CPU, for a look at whether it works. batch:
    sequences a step; 0: what makes a step last about 160 ms. windows: of each method. steps: from save to save. saves:
    of the soak. work: folder on the medium to save to, where rows go, too. trace: folder for traces, or None. began:
    seconds of time.monotonic() from which progress counts.
    """

    device: str
    tiny: bool
    batch: int
    windows: int
    steps: int
    saves: int
    work: str
    trace: str | None
    began: float

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Options:
        values: dict[str, Any] = json.loads(text)
        return cls(**values)


@dataclass(frozen=True, slots=True)
class Bench:
    """One part under way."""

    options: Options
    part: str
    device: torch.device

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    @property
    def shape(self) -> Shape:
        return TINY if self.options.tiny else LARGE

    @property
    def smaller(self) -> Shape:
        return TINY if self.options.tiny else MIDDLE

    @property
    def copy_bytes(self) -> int:
        """Of one of the copies that show what the bus gives."""
        return 1 << 20 if self.options.tiny else 1 << 30

    def training(self) -> Training:
        """The large model, with the optimizer's state made and everything warm."""
        batch = self.options.batch or (2 if self.options.tiny else fitting_batch(self.shape, self.device))
        # Of the models that were tried out: two large ones do not fit.
        self.free()
        job = Training(self.shape, batch, self.device)
        job.run(3)
        self.say(f"{job.nbytes() / 1e9:.2f} GB of state, batch {job.batch}")
        return job

    def free(self) -> None:
        """Device memory that nobody holds goes back to the driver."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.options.began:6.1f} s] {self.part}: {text}", flush=True)

    def row(self, name: str, **values: Any) -> None:
        """Written at once: a process that dies later has not lost it."""
        with (Path(self.options.work) / f"{self.part}.jsonl").open("a") as file:
            file.write(json.dumps({"part": self.part, "row": name, "device": self.device_name, **values}) + "\n")
        self.say(f"{name}: {values.get('error') or _short(values)}")

    def attempt(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """What `work` gives is a row, and so is its error; None then. Device memory is free again afterwards."""
        self.say(f"{name} ...")
        try:
            values = work()
        except Exception as error:
            traceback.print_exc()
            values = {"error": self._plain(error)}
        self.free()
        self.row(name, **values)
        return None if "error" in values else values

    def cost(self, job: Training, method: Method, windows: int | None = None) -> dict[str, Any]:
        """What `method` costs; it is closed afterwards."""
        try:
            measured = measure(job, method, windows or self.options.windows, self.options.steps)
        except BaseException:
            with suppress(Exception):
                method.close()
            raise
        try:
            method.close()
        except Exception as error:
            measured.setdefault("failed", f"close: {type(error).__name__}: {error}")
        return measured

    @contextmanager
    def folder(self, name: str) -> Iterator[Path]:
        """An empty one for checkpoints, of which nothing is left."""
        path = Path(self.options.work) / name
        path.mkdir()
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def _plain(self, error: Exception) -> str:
        text = f"{type(error).__name__}: {error}".replace(self.options.work, "DIR")
        return text if len(text) <= MOST_ERROR else text[:MOST_ERROR] + " ..."


def _short(values: dict[str, Any]) -> str:
    return json.dumps(values, default=str)[:200]
