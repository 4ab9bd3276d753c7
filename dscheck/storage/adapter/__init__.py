"""Any file system of fsspec as a Storage: `storage` has the verbs, `put` what there is of a condition."""

from dscheck.storage.adapter.storage import FsspecStorage

__all__ = ["FsspecStorage"]
