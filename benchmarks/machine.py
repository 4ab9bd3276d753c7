"""The facts that a number needs beside it, and nothing that names whose machine it was."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

BUSES = {"nvme": "NVMe", "vd": "virtio", "xvd": "Xen", "sd": "SCSI or SATA", "mmcblk": "flash card", "md": "RAID"}


def describe(folder: Path) -> dict[str, str | int | float]:
    """Processor, cores, memory, and what `folder` lies on."""
    return {
        "cpu": _field(Path("/proc/cpuinfo"), "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(_field(Path("/proc/meminfo"), "MemTotal").split()[0]) / (1 << 20), 1),
        "kernel": platform.release().split("-")[0],
        "disk": disk(folder),
    }


def commit() -> str:
    """The short hash of what is checked out here."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def versions(*packages: str) -> dict[str, str]:
    return {"python": platform.python_version()} | {package: version(package) for package in packages}


def disk(folder: Path) -> str:
    """The file system and the kind of device below it, such as "ext4 on virtio"."""
    system = _file_system(folder)
    number = os.stat(folder).st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not device.exists():
        return system
    whole = device.resolve()
    whole = whole if (whole / "queue").exists() else whole.parent
    bus = next((bus for prefix, bus in BUSES.items() if whole.name.startswith(prefix)), "unknown device")
    return f"{system} on {bus}"


def _file_system(folder: Path) -> str:
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    above: Sequence[Path] = (folder.resolve(), *folder.resolve().parents)
    types = {mount[1]: mount[2] for mount in mounts}
    return next((types[str(path)] for path in above if str(path) in types), "unknown file system")


def _field(path: Path, name: str) -> str:
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "0 unknown")
