"""The members of a JSON object from storage, read one by one with their types checked."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from dscheck.errors import CorruptCheckpointError, UnsupportedFormatError
from dscheck.manifest.keys import LARGEST

VERSION = 1
"""The format's version in every sealed object."""

SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


class Fields:
    """The members of one JSON object, each read with its type checked. Members that nobody asks for are ignored."""

    def __init__(self, members: Mapping[str, Any], key: str, where: str = "") -> None:
        self._members, self._key, self._where = members, key, where

    def envelope(self, *kinds: str, known: Collection[str] = ()) -> str:
        """The object's kind, once its version is ours, and what it requires is `known`."""
        version, requires = self.get("version"), self.get("requires")
        if type(version) is not int or type(requires) is not list:
            raise self.corrupt("version", "and 'requires' are not a number and a list")
        if version != VERSION or any(name not in known for name in requires):
            raise UnsupportedFormatError(
                f"'{self._key}' has format version {version} and requires {requires}; this dscheck reads version "
                f"{VERSION} with {', '.join(known) or 'no extensions'}: use a newer one",
                key=self._key,
                version=version,
                requires=requires,
            )
        kind = self.text("kind")
        if kind not in kinds:
            raise self.corrupt("kind", f"is {kind!r}, {' or '.join(kinds)} expected")
        return kind

    def get(self, name: str) -> Any:
        """The member as it is. Raises CorruptCheckpointError, as all methods do, when it is not there."""
        if name not in self._members:
            raise self.corrupt(name, "is missing")
        return self._members[name]

    def count(self, name: str) -> int:
        """An integer from 0 to 2**63 - 1."""
        value = self.get(name)
        if type(value) is not int or not 0 <= value <= LARGEST:
            raise self.corrupt(name, f"is {_short(value)}, an integer from 0 to {LARGEST} expected")
        return value

    def number(self, name: str) -> float:
        """A finite number."""
        value = self.get(name)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self.corrupt(name, f"is {_short(value)}, a number expected")
        return float(value)

    def text(self, name: str) -> str:
        value = self.get(name)
        if type(value) is not str:
            raise self.corrupt(name, f"is {_short(value)}, a string expected")
        return value

    def texts(self, name: str) -> dict[str, str]:
        """An object whose members are all strings."""
        value = self.get(name)
        if type(value) is not dict or any(type(text) is not str for text in value.values()):
            raise self.corrupt(name, f"is {_short(value)}, an object of strings expected")
        return value

    def numbers(self, name: str) -> dict[str, float | None]:
        """An object whose members are finite numbers or null."""
        value = self.get(name)
        if type(value) is not dict or any(
            number is not None and type(number) not in (int, float) for number in value.values()
        ):
            raise self.corrupt(name, f"is {_short(value)}, an object of numbers expected")
        return {key: None if number is None else float(number) for key, number in value.items()}

    def sha256(self, name: str) -> str:
        """64 lower-case hex digits."""
        value = self.text(name)
        if not SHA256.fullmatch(value):
            raise self.corrupt(name, f"is {_short(value)}, 64 hex digits expected")
        return value

    def items(self, name: str) -> list[Any]:
        value = self.get(name)
        if type(value) is not list:
            raise self.corrupt(name, f"is {_short(value)}, a list expected")
        return value

    def members(self, name: str) -> dict[str, Any]:
        """A nested object as it is."""
        value = self.get(name)
        if type(value) is not dict:
            raise self.corrupt(name, f"is {_short(value)}, an object expected")
        return value

    def fields(self, name: str) -> Fields:
        """A nested object, to be read the same way."""
        return Fields(self.members(name), self._key, f"{self._where}{name}.")

    def corrupt(self, name: str, what: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(
            f"'{self._where}{name}' in '{self._key}' {what}; the object is damaged, or was not written by dscheck: "
            "run `dscheck verify`",
            key=self._key,
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
