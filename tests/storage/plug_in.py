"""The back end that docs/storage.md shows, as the package that a stranger would install."""

from __future__ import annotations

import base64
import hashlib
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

DOCS = (Path(__file__).parents[2] / "docs" / "storage.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", DOCS, re.MULTILINE | re.DOTALL)


def block(language: str, containing: str) -> str:
    """The one code block of docs/storage.md that is meant."""
    (found,) = [text for kind, text in BLOCKS if kind == language and containing in text]
    return found


MODULE = block("python", "class SqliteStorage:")
TESTS = block("python", "class TestSqliteStorage(")
PROJECT = tomllib.loads(block("toml", "dscheck.storage"))["project"]


def install(
    site: Path,
    *,
    name: str = PROJECT["name"],
    module: str = MODULE,
    points: dict[str, str] = PROJECT["entry-points"]["dscheck.storage"],
) -> None:
    """pip installs the package into the folder `site`, from a wheel that is made here: no index, no build."""
    package, version = name.replace("-", "_"), PROJECT["version"]
    listed = "\n".join(f"{scheme} = {value}" for scheme, value in points.items())
    files = {
        f"{package}.py": module,
        f"{package}-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{package}-{version}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{package}-{version}.dist-info/entry_points.txt": f"[dscheck.storage]\n{listed}\n",
    }
    record = "".join(f"{path},sha256={_digest(text)},{len(text.encode())}\n" for path, text in files.items())
    wheel = site.parent / f"{package}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
        archive.writestr(f"{package}-{version}.dist-info/RECORD", record)
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-index",
        "--no-deps",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=100)


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
