"""Capture: live tensors become a host snapshot of the moment `save()` was called, while training goes on."""

from dscheck.snapshot.arena import Arena
from dscheck.snapshot.bits import bits, sample
from dscheck.snapshot.capture import Capture, Lanes, Source
from dscheck.snapshot.fence import Fences

__all__ = ["Arena", "Capture", "Fences", "Lanes", "Source", "bits", "sample"]
