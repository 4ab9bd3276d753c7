"""Every numbered line of docs/commit.md has a test whose docstring names it: "commit P4, P5"."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"^- \*\*P(\d+)\*\*(?: \(((?:C\d+(?:, )?)+)\))?", re.MULTILINE)
NAMED = re.compile(r"\bcommit ((?:P\d+)(?:,\s+P\d+)*)")
TEXT = (ROOT / "docs/commit.md").read_text()


def lines_with_a_test() -> set[int]:
    """The lines that some test below tests/ names."""
    found: set[int] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                groups = NAMED.findall(ast.get_docstring(node) or "")
                found.update(int(number) for group in groups for number in re.findall(r"\d+", group))
    return found


def test_lines_are_numbered_without_a_gap() -> None:
    numbers = [int(number) for number, _ in LINE.findall(TEXT)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) > 20


def test_tests_name_every_line_and_no_other() -> None:
    assert lines_with_a_test() == {int(number) for number, _ in LINE.findall(TEXT)}


def test_lines_refer_to_lines_that_are_there() -> None:
    assert {int(number) for number in re.findall(r"\bP(\d+)\b", TEXT)} <= {int(n) for n, _ in LINE.findall(TEXT)}


def test_the_invariants_that_commit_must_hold_are_served() -> None:
    """C1 to C4, C7 and C15 are this room's; a line says which of them it serves, and none that does not exist."""
    served = {int(c) for _, group in LINE.findall(TEXT) for c in re.findall(r"\d+", group)}
    assert {1, 2, 3, 4, 7, 15} <= served <= set(range(1, 16))
