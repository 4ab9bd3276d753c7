"""Objects in a bucket of S3, or of a store that speaks its protocol."""

from __future__ import annotations

from dscheck.storage.s3.storage import S3Storage

__all__ = ["S3Storage"]
