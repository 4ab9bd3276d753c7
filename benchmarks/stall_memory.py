"""How much memory a process and its device held at most."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


class HostPeak:
    """How much more memory than at this moment the process has held since then, shared memory that it maps included."""

    def __init__(self) -> None:
        self._before = status_bytes("VmRSS")
        # 5: begin the high-water mark anew; where that is not allowed, the mark includes what was before.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def grown(self) -> int:
        return max(status_bytes("VmHWM"), status_bytes("VmRSS")) - self._before


def status_bytes(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) << 10


def device_used(device: torch.device) -> int:
    """Bytes of device memory in use outside torch's caching allocator, by whomever; 0 without a CUDA device."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)
