"""Capture: live tensors become a host snapshot of the moment `save()` was called, while training goes on."""

from dscheck.snapshot.bits import bits
from dscheck.snapshot.capture import Capture, Chunk, Span
from dscheck.snapshot.capturer import Capturer
from dscheck.snapshot.fence import Fences
from dscheck.snapshot.plan import CapturePlan, Placement, Source

__all__ = ["Capture", "CapturePlan", "Capturer", "Chunk", "Fences", "Placement", "Source", "Span", "bits"]
