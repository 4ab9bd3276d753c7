"""What was taken at a save and is put into words where it is written, off the training thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Later:
    """A value that can change no more, whose tagged form is still to be made: by `make`, on whatever thread."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make


def make_now(value: Any) -> Any:
    """The `default` of json.dumps for tagged values in which some are made later."""
    if isinstance(value, Later):
        return value.make()
    raise TypeError(f"a {type(value).__name__} in the tagged form of an object")
