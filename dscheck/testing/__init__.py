"""The kit with which a back end, a commit or a job is tested: faults to inject, and facts that a back end inherits."""

from __future__ import annotations

from dscheck.testing.faults import (
    Crash,
    Fault,
    Faulty,
    Operation,
    after,
    amid,
    before,
    crash_after,
    fail_at,
    hang,
    lost_answer,
    slow,
)
from dscheck.testing.power import PowerCut
from dscheck.testing.unconditional import Unconditional

__all__ = [
    "Crash",
    "Fault",
    "Faulty",
    "Operation",
    "PowerCut",
    "Unconditional",
    "after",
    "amid",
    "before",
    "crash_after",
    "fail_at",
    "hang",
    "lost_answer",
    "slow",
]
