"""Every numbered line of docs/format.md has a test whose docstring names it: "format F12, F13"."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"^(?:- |\| )\*\*F(\d+)\*\*", re.MULTILINE)
NAMED = re.compile(r"\bformat ((?:F\d+)(?:,\s+F\d+)*)")


def lines_of_the_spec() -> list[int]:
    return [int(number) for number in LINE.findall((ROOT / "docs/format.md").read_text())]


def lines_with_a_test() -> Counter[int]:
    """How many tests below tests/ name each line."""
    found: Counter[int] = Counter()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                groups = NAMED.findall(ast.get_docstring(node) or "")
                found.update({int(number) for group in groups for number in re.findall(r"\d+", group)})
    return found


def test_lines_are_numbered_without_a_gap() -> None:
    numbers = lines_of_the_spec()
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) > 90


def test_every_line_has_a_test_that_names_it() -> None:
    untested = set(lines_of_the_spec()) - lines_with_a_test().keys()
    assert not untested, f"no test names format {sorted(untested)}"


def test_no_test_names_a_line_that_is_not_there() -> None:
    assert lines_with_a_test().keys() <= set(lines_of_the_spec())


def test_lines_refer_to_lines_that_are_there() -> None:
    text = (ROOT / "docs/format.md").read_text()
    assert {int(number) for number in re.findall(r"\bF(\d+)\b", text)} <= set(lines_of_the_spec())
