"""The settings of a Checkpointer, checked once, with their units in their names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from dscheck.errors import ConfigError

WhenBusy = Literal["wait", "skip"]
OnFailure = Literal["warn", "raise"]
Replicas = Literal["equal", "first"]
Commit = Literal["put-if-absent", "single-writer"]
CodecName = Literal["none", "zstd", "shuffle-zstd", "auto"]
Auto = Literal["auto"]

Mode = Literal["min", "max"]

MIB = 1 << 20
LONGEST_S = 10_000_000
"""Some months: what every clock and wait of the platform can count."""


@dataclass(frozen=True, slots=True)
class Keep:
    """Which committed steps a job keeps; the others it deletes in the background. Pinned steps stay in any case.

    last: the newest so many, at least 1. every: those that it divides, such as 1000. best: so many whose metric `by` is
    the least ("min") or greatest ("max"); of equal ones the newer. Steps without that metric are not among them.
    Raises ConfigError.
    """

    last: int = 1
    every: int | None = None
    best: int = 0
    by: str | None = None
    mode: Mode = "min"

    def __post_init__(self) -> None:
        for name, least in (("last", 1), ("every", 1), ("best", 0)):
            value = getattr(self, name)
            if not (name == "every" and value is None) and (type(value) is not int or value < least):
                raise ConfigError(f"keep: {name}={value!r}: expected an int, at least {least}")
        if self.by is not None and (type(self.by) is not str or not self.by):
            raise ConfigError(f"keep: by={self.by!r}: expected the name of a metric that save() is given")
        if (self.best > 0) != (self.by is not None):
            raise ConfigError(f"keep: best={self.best}, by={self.by!r}: give both, such as Keep(best=2, by='loss')")
        if self.mode not in get_args(Mode):
            raise ConfigError(f"keep: mode={self.mode!r}: expected one of {get_args(Mode)}")


def as_keep(keep: int | Keep) -> Keep:
    """A number means the newest so many. Raises ConfigError."""
    if isinstance(keep, Keep):
        return keep
    if type(keep) is not int or keep < 1:
        raise ConfigError(f"keep={keep!r}: expected at least 1, a Keep, or None to delete nothing")
    return Keep(last=keep)


_KINDS: dict[str, tuple[type, ...]] = {
    "timeout_s": (int, float),
    "upload_timeout_s": (int, float),
    "when_busy": (str,),
    "on_failure": (str,),
    "replicas": (str,),
    "commit": (str,),
    "keep": (int, Keep, type(None)),
    "fresh": (bool,),
    "rng": (bool,),
    "block_bytes": (int,),
    "codec": (str,),
    "piece_bytes": (int,),
    "read_threads": (int,),
    "read_memory_bytes": (int,),
    "host_memory_bytes": (int, str),
    "device_memory_bytes": (int, str),
    "copy_threads": (int,),
    "io_threads": (int,),
    "io_bytes_in_flight": (int,),
    "direct_io": (bool,),
    "trace": (str, type(None)),
    "check_capture": (bool,),
    "store_host": (str, type(None)),
    "store_port": (int,),
}


_CHOICES = {
    "when_busy": WhenBusy,
    "on_failure": OnFailure,
    "replicas": Replicas,
    "commit": Commit,
    "codec": CodecName,
}


@dataclass(frozen=True, slots=True)
class Settings:
    """How a Checkpointer behaves; every field is a keyword argument of it.

    timeout_s: deadline of one save or load, fence included; no wait is longer (C7).
    upload_timeout_s: deadline of the uploads that follow one save, from a near tier to the shared one.
    when_busy: earlier saves are unfinished and leave no room: "wait" for it inside `save()`, or "skip" the step on all
    ranks.
    on_failure: a save failed in the background: "warn", or also "raise" at the next call.
    replicas: ranks claim one plain tensor: "equal" refuses them when they differ, "first" takes the lowest rank's.
    commit: "put-if-absent", or "single-writer" for a store without that condition, where only one job at a time may
    write: docs/commit.md P28 to P31 say what it does not promise.
    keep: which steps stay, a `Keep`, a number of last steps, or None for all; the others are deleted in the background
    after a commit.
    fresh: start a new history in a root that has commits, instead of refusing to save before a load.
    rng: capture and restore the random generators of Python, NumPy and torch.
    block_bytes: length of a checksummed block, the unit of reading; a power of two, 4 KiB to 64 MiB.
    codec: how blocks are stored: "none", "zstd", "shuffle-zstd" (byte planes, then zstd: for floats), or "auto": what
    is fastest by the rates of storage and codecs that the first saves show.
    piece_bytes: length of one capture copy.
    read_threads: concurrent reads of one rank at load.
    read_memory_bytes: most host memory for reads under way at load, but enough for five: of up to 18 MiB, or of two
    blocks and 10 MiB where these are more.
    host_memory_bytes: most host memory for captures that are not written yet; "auto": what this rank captures, once.
    device_memory_bytes: most device memory for what the host cannot take in time; "auto": what is free, less a reserve;
    0: none.
    copy_threads: threads that copy host tensors and compute checksums.
    io_threads: threads of one rank that write files, or compress.
    io_bytes_in_flight: most bytes that the ranks of one node have given to the kernel to write at a time.
    direct_io: write files past the page cache where kernel and file system allow it.
    trace: folder for one Chrome/Perfetto trace a save and rank, `trace-<step>-rank<rank>.json`; None: no traces.
    check_capture: hash everything inside `save()` and compare what is stored with it: slow, for debugging.
    store_host, store_port: where rank 0 opens the store the ranks talk through; None and 0 choose by themselves.
    """

    timeout_s: float = 600.0
    upload_timeout_s: float = 3600.0
    when_busy: WhenBusy = "wait"
    on_failure: OnFailure = "warn"
    replicas: Replicas = "equal"
    commit: Commit = "put-if-absent"
    keep: Keep | int | None = None
    fresh: bool = False
    rng: bool = True
    block_bytes: int = 256 << 10
    codec: CodecName = "none"
    piece_bytes: int = 32 * MIB
    read_threads: int = 4
    read_memory_bytes: int = 256 * MIB
    host_memory_bytes: int | Auto = "auto"
    device_memory_bytes: int | Auto = "auto"
    copy_threads: int = 4
    io_threads: int = 4
    io_bytes_in_flight: int = 256 * MIB
    direct_io: bool = True
    trace: str | None = None
    check_capture: bool = False
    store_host: str | None = None
    store_port: int = 0

    def __post_init__(self) -> None:
        for name, kinds in _KINDS.items():
            if type(getattr(self, name)) not in kinds:
                expected = " or ".join(kind.__name__ for kind in kinds)
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected {expected}")
        if self.keep is not None:
            as_keep(self.keep)
        for name in ("timeout_s", "upload_timeout_s"):
            if not 0 < getattr(self, name) <= LONGEST_S:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r}: expected seconds, more than 0 and at most {LONGEST_S}"
                )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in get_args(choices):
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected one of {get_args(choices)}")
        if not 4096 <= self.block_bytes <= 64 * MIB or self.block_bytes & (self.block_bytes - 1):
            raise ConfigError(f"block_bytes={self.block_bytes!r}: expected a power of two from 4096 to {64 * MIB}")
        least_of = {"piece_bytes": 4096, "read_threads": 1, "read_memory_bytes": 1, "copy_threads": 1, "io_threads": 1}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected at least {least}")
        for name, least in (("host_memory_bytes", 1), ("device_memory_bytes", 0), ("io_bytes_in_flight", 1)):
            _check_budget(name, getattr(self, name), least)
        if self.trace == "":
            raise ConfigError("trace='': expected the path of a folder, or None")

    @property
    def kept(self) -> Keep | None:
        """`keep` as a Keep."""
        return None if self.keep is None else as_keep(self.keep)


def _check_budget(name: str, value: int | str, least: int) -> None:
    if value != "auto" and (isinstance(value, str) or value < least):
        raise ConfigError(f"{name}={value!r}: expected bytes, at least {least}, or 'auto'")
