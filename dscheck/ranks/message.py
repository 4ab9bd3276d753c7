"""The small messages of an exchange: JSON, compressed. Never pickle: a store has no authentication (C9)."""

from __future__ import annotations

import json
import zlib
from typing import Any


def pack(document: Any) -> bytes:
    """A document of plain JSON values as bytes."""
    return zlib.compress(json.dumps(document, separators=(",", ":")).encode(), 1)


def unpack(data: bytes) -> Any:
    """What `pack` was given, tuples as lists."""
    return json.loads(zlib.decompress(data))
