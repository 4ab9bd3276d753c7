"""Every trap of docs/traps.md that has been built against is named by a test."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
TRAPS = TESTS.parent / "docs" / "traps.md"
LATER = {30, 33, 35, 38, 39}
NAMED = re.compile(r"TRAPS (\d+(?:(?:, | to | and )\d+)*)")


def named() -> set[int]:
    """The numbers behind "TRAPS" in all tests."""
    found: set[int] = set()
    for path in TESTS.rglob("*.py"):
        for group in NAMED.findall(path.read_text(encoding="utf-8")):
            numbers = [int(number) for number in re.findall(r"\d+", group)]
            found.update(range(numbers[0], numbers[-1] + 1) if " to " in group else numbers)
    return found


def test_each_trap_has_a_test_that_names_it() -> None:
    numbers = {int(number) for number in re.findall(r"^(\d+)\. ", TRAPS.read_text(encoding="utf-8"), re.MULTILINE)}
    assert numbers == set(range(1, 40))
    assert numbers - LATER - named() == set()
