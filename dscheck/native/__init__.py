"""The compiled core: one verb, one native file, one stub, one test each. Every call releases the GIL."""

from dscheck.native._core import crc32c, crc32c_blocks, crc32c_is_accelerated

__all__ = ["crc32c", "crc32c_blocks", "crc32c_is_accelerated"]
