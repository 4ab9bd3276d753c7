"""Where the bytes go: the protocol in `base`, one module a medium, and `schemes`, which knows them by URL."""

from dscheck.storage.base import Entry, ObjectWriter, Storage
from dscheck.storage.local import LocalStorage
from dscheck.storage.memory import MemoryStorage
from dscheck.storage.redact import redact_url
from dscheck.storage.schemes import open_storage

__all__ = ["Entry", "LocalStorage", "MemoryStorage", "ObjectWriter", "Storage", "open_storage", "redact_url"]
