"""The compiled core. Whatever takes long there releases the GIL."""

from dscheck.native._core import (
    Anything,
    Entries,
    Equal,
    Kind,
    Members,
    Memory,
    Node,
    Same,
    Standing,
    crc32c,
    crc32c_blocks,
    crc32c_is_accelerated,
    look,
)

__all__ = [
    "Anything",
    "Entries",
    "Equal",
    "Kind",
    "Members",
    "Memory",
    "Node",
    "Same",
    "Standing",
    "crc32c",
    "crc32c_blocks",
    "crc32c_is_accelerated",
    "look",
]
