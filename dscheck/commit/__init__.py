"""When a step exists: terms claimed, records published once, the history read. Source: docs/commit.md."""

from dscheck.commit.history import History, read_history
from dscheck.commit.listing import StepRef
from dscheck.commit.publish import await_record, check_files, publish, put_files, put_plan
from dscheck.commit.single_writer import SingleWriter
from dscheck.commit.term import assert_newest, claim, confirm

__all__ = [
    "History",
    "SingleWriter",
    "StepRef",
    "assert_newest",
    "await_record",
    "check_files",
    "claim",
    "confirm",
    "publish",
    "put_files",
    "put_plan",
    "read_history",
]
