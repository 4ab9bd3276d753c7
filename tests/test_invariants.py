"""Every invariant of docs/invariants.md is named by a test."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
INVARIANTS = TESTS.parent / "docs" / "invariants.md"


def test_each_invariant_is_named_by_a_test() -> None:
    numbers = re.findall(r"^- \*\*C(\d+)\*\*", INVARIANTS.read_text(encoding="utf-8"), re.MULTILINE)
    assert [int(number) for number in numbers] == list(range(1, 16))
    texts = [path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py") if path != Path(__file__)]
    named = {int(number) for text in texts for number in re.findall(r"\bC(\d+)\b", text)}
    assert set(range(1, 16)) - named == set()
