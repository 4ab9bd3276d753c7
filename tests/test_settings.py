"""Every setting is checked once, at construction, by name."""

from __future__ import annotations

from typing import Any

import pytest

from dscheck.config import Keep, Settings
from dscheck.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("host_memory_bytes", 0),
        ("host_memory_bytes", -1),
        ("host_memory_bytes", True),
        ("host_memory_bytes", 1e9),
        ("host_memory_bytes", "8GiB"),
        ("host_memory_bytes", None),
        ("device_memory_bytes", -1),
        ("device_memory_bytes", False),
        ("device_memory_bytes", "none"),
        ("copy_threads", 0),
        ("copy_threads", True),
        ("trace", 3),
        ("trace", ""),
        ("check_capture", 1),
        ("keep", 0),
        ("keep", -1),
        ("keep", True),
        ("keep", "3"),
        ("keep", {"last": 3}),
    ],
)
def test_a_bad_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name}="):
        Settings(**{name: value})


def test_budgets_are_bytes_or_auto_and_a_device_may_lend_none() -> None:
    assert Settings().host_memory_bytes == Settings().device_memory_bytes == "auto"
    assert Settings(host_memory_bytes=1, device_memory_bytes=0).device_memory_bytes == 0


def test_a_number_of_steps_to_keep_is_that_many_of_the_last() -> None:
    assert Settings(keep=3).kept == Keep(last=3)
    assert Settings(keep=Keep(last=2, every=10)).kept == Keep(last=2, every=10)
    assert Settings().kept is None
