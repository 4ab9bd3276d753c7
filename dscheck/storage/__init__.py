"""Where the bytes go: the protocol in `base`, one module a medium, and `schemes`, which knows them by URL."""

from dscheck.storage.base import Entry, ObjectWriter, Storage
from dscheck.storage.local import LocalStorage
from dscheck.storage.memory import MemoryStorage
from dscheck.storage.redact import redact_url
from dscheck.storage.schemes import open_storage
from dscheck.storage.tier import Root, Tier, Tiers, open_tiers

__all__ = [
    "Entry",
    "LocalStorage",
    "MemoryStorage",
    "ObjectWriter",
    "Root",
    "Storage",
    "Tier",
    "Tiers",
    "open_storage",
    "open_tiers",
    "redact_url",
]
