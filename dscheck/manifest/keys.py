"""The names of all objects below a root, and the two that are read back from a listing. Source: docs/format.md."""

from __future__ import annotations

import re

LARGEST = 2**63 - 1
"""The largest step or term: what an int64 holds."""

_NUMBER = r"(0|[1-9][0-9]{0,18})"
_TERM = re.compile(rf"terms/{_NUMBER}\.json", re.ASCII)
_RECORD = re.compile(rf"records/{_NUMBER}-{_NUMBER}\.json", re.ASCII)
_DELETION = re.compile(rf"records/{_NUMBER}-{_NUMBER}\.deleted\.json", re.ASCII)
_PIN = re.compile(rf"pins/{_NUMBER}-{_NUMBER}\.json", re.ASCII)
_PLAN = re.compile(rf"plans/{_NUMBER}-[0-9a-f]{{64}}\.arrow", re.ASCII)
_OF_ATTEMPT = re.compile(rf"steps/{_NUMBER}/{_NUMBER}/(?:data-{_NUMBER}\.bin|files\.arrow)", re.ASCII)


def term_key(term: int) -> str:
    """
    >>> term_key(2)
    'terms/2.json'
    """
    return f"terms/{_checked(term)}.json"


def record_key(step: int, term: int) -> str:
    """
    >>> record_key(300, 2)
    'records/300-2.json'
    """
    return f"records/{_checked(step)}-{_checked(term)}.json"


def deletion_key(step: int, term: int) -> str:
    """
    >>> deletion_key(300, 2)
    'records/300-2.deleted.json'
    """
    return f"records/{_checked(step)}-{_checked(term)}.deleted.json"


def pin_key(step: int, term: int) -> str:
    """
    >>> pin_key(300, 2)
    'pins/300-2.json'
    """
    return f"pins/{_checked(step)}-{_checked(term)}.json"


def plan_key(term: int, sha256_hex: str) -> str:
    """The plan whose bytes have this SHA-256: published, and used, by its own term only."""
    return f"plans/{_checked(term)}-{sha256_hex}.arrow"


def attempt_prefix(step: int, term: int) -> str:
    """
    >>> attempt_prefix(300, 2)
    'steps/300/2/'
    """
    return f"steps/{_checked(step)}/{_checked(term)}/"


def data_key(step: int, term: int, rank: int) -> str:
    """
    >>> data_key(300, 2, 0)
    'steps/300/2/data-0.bin'
    """
    return f"{attempt_prefix(step, term)}data-{_checked(rank)}.bin"


def files_key(step: int, term: int) -> str:
    """
    >>> files_key(300, 2)
    'steps/300/2/files.arrow'
    """
    return f"{attempt_prefix(step, term)}files.arrow"


def parse_term_key(key: str) -> int | None:
    """The term of a name that `term_key` makes; None for every other name, leading zeros included."""
    numbers = _parse(_TERM, key)
    return numbers[0] if numbers else None


def parse_deletion_key(key: str) -> tuple[int, int] | None:
    """The (step, term) of a name that `deletion_key` makes; None for every other name."""
    return _pair(_DELETION, key)


def parse_pin_key(key: str) -> tuple[int, int] | None:
    """The (step, term) of a name that `pin_key` makes; None for every other name."""
    return _pair(_PIN, key)


def parse_plan_key(key: str) -> int | None:
    """The term of a name that `plan_key` makes; None for every other name."""
    numbers = _parse(_PLAN, key)
    return numbers[0] if numbers else None


def parse_attempt_key(key: str) -> tuple[int, int] | None:
    """The (step, term) of a name that `data_key` or `files_key` makes; None for every other name.

    >>> parse_attempt_key("steps/300/2/data-0.bin"), parse_attempt_key("steps/300/2/notes.txt")
    ((300, 2), None)
    """
    return _pair(_OF_ATTEMPT, key)


def parse_record_key(key: str) -> tuple[int, int] | None:
    """The (step, term) of a name that `record_key` makes; None for every other name.

    >>> parse_record_key("records/300-2.json"), parse_record_key("records/0300-2.json")
    ((300, 2), None)
    """
    return _pair(_RECORD, key)


def _pair(pattern: re.Pattern[str], key: str) -> tuple[int, int] | None:
    numbers = _parse(pattern, key)
    return (numbers[0], numbers[1]) if numbers else None


def _parse(pattern: re.Pattern[str], key: str) -> list[int] | None:
    match = pattern.fullmatch(key)
    numbers = [int(group) for group in match.groups() if group is not None] if match else []
    return numbers if numbers and max(numbers) <= LARGEST else None


def _checked(number: int) -> int:
    # A bool, a float or a NumPy integer would make another name, or the same by luck.
    if type(number) is not int or not 0 <= number <= LARGEST:
        raise ValueError(f"a step, term or rank is an int from 0 to {LARGEST}, not {number!r}")
    return number
