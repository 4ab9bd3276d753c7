"""Plans through a storage, as a load reads them."""

from __future__ import annotations

from unittest import mock

from dscheck.commit import put_plan
from dscheck.commit.stored import StoredPlan
from dscheck.manifest.arrow import EncodedPlan, decode_batch, decode_head, encode_plan, refusing
from dscheck.manifest.fragments import Fragments
from dscheck.manifest.head import BatchRules, Head
from dscheck.manifest.plan import Plan
from dscheck.storage.memory import MemoryStorage
from tests.manifest.test_plan import PLAN


def encoded(plan: Plan, batch_rows: int) -> EncodedPlan:
    with mock.patch("dscheck.manifest.arrow.BATCH_ROWS", batch_rows):
        return encode_plan(plan)


def stored(plan: Plan, batch_rows: int = 1024) -> StoredPlan:
    storage = MemoryStorage()
    return StoredPlan(storage, 1, put_plan(storage, 1, encoded(plan, batch_rows)))


def head_of(plan: EncodedPlan) -> bytes:
    return plan.data[: plan.head.size]


ENCODED = encode_plan(PLAN)
HEAD = head_of(ENCODED)
BATCH = ENCODED.data[len(HEAD) :]
"""The parts of a small plan, which has one batch."""


def decoded_head(data: bytes, key: str = "k") -> Head:
    return decode_head(data, key)


def decoded_batch(data: bytes, key: str = "k") -> Fragments:
    """As the batch of the small plan."""
    head = decode_head(HEAD, key)
    rules = BatchRules(head)
    rows = decode_batch(data, 0, head, rules, key)
    with refusing(f"{key} batch 0"):
        rules.check_batch(0, rows)
    return rows
