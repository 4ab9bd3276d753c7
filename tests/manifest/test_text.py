"""Sealed JSON: one spelling, one digest, no surprises inside."""

from __future__ import annotations

import hashlib
import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dscheck.errors import CorruptCheckpointError
from dscheck.manifest.text import LIMIT_BYTES, seal, unseal

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
bodies = st.dictionaries(st.text().filter(lambda name: name != "sha256"), values, min_size=1, max_size=5)


def resealed(text: bytes) -> bytes:
    """`text`, all but the closing brace of an object, under a digest of its own."""
    return text + b',"sha256":"' + hashlib.sha256(text).hexdigest().encode() + b'"}\n'


@given(bodies)
def test_unseal_gives_back_what_was_sealed(body: dict[str, object]) -> None:
    """format F9, F10, F11, F12"""
    data = seal(body)
    found = unseal(data, "k", None)
    assert found == body
    assert json.dumps(found, sort_keys=True) == json.dumps(body, sort_keys=True)
    assert data.isascii()
    assert json.loads(data)["sha256"] == hashlib.sha256(data[: data.rindex(b',"sha256":')]).hexdigest()


def test_the_text_is_compact_and_ends_with_its_digest() -> None:
    """format F9, F10"""
    text = b'{"a":"\\u00e9","b":{"z":1,"y":2}'
    assert seal({"b": {"z": 1, "y": 2}, "a": "é"}) == resealed(text)


def test_a_digest_inside_the_text_is_not_taken_for_the_last_one() -> None:
    """format F10"""
    body = {"a": ',"sha256":"' + "0" * 64 + '"}', "z": {"sha256": "1"}}
    assert unseal(seal(body), "k") == body


def test_nested_members_keep_their_order() -> None:
    """format F13"""
    body = {"objects": {"b": {"z": 1, "a": 2}, "a": 0}}
    assert json.dumps(unseal(seal(body), "k")) == json.dumps(body)


@given(
    st.binary(min_size=8, max_size=8)
    .map(lambda raw: struct.unpack("<d", raw)[0])
    .filter(lambda x: abs(x) < float("inf"))
)
def test_floats_keep_every_bit(number: float) -> None:
    """format F12"""
    found = unseal(seal({"x": number}), "k")["x"]
    assert type(found) is float
    assert struct.pack("<d", found) == struct.pack("<d", number)


@pytest.mark.parametrize("number", [0, -1, 2**63 - 1, -(2**63)])
def test_integers_stay_integers(number: int) -> None:
    """format F11, F12"""
    found = unseal(seal({"x": number}), "k")["x"]
    assert type(found) is int
    assert found == number


@pytest.mark.parametrize("body", [{}, {"sha256": "x"}, {"x": float("nan")}, {"x": [float("inf")]}])
def test_what_has_no_sealed_form_is_not_sealed(body: dict[str, object]) -> None:
    """format F9, F11"""
    with pytest.raises(ValueError, match=r"sealed body|JSON compliant"):
        seal(body)


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":1,"a":1',
        b'{"a":{"b":1,"b":2}',
        b'{"a":NaN',
        b'{"a":-Infinity',
        b'{"a":9223372036854775808',
        b'{"a":' + b"1" * 5000,
        b'{"a":1e999',
        b'{"a":[' + b"[" * 100_000,
        b'{"a":"\xc3\xa9"',
        b'{"a":1},{"b":2',
        b'{"a":01',
        b"[1",
        b"",
    ],
    ids=lambda text: repr(text[:24]),
)
def test_other_json_is_refused_however_well_sealed(text: bytes) -> None:
    """format F9, F11"""
    with pytest.raises(CorruptCheckpointError, match=r"'records/1-1\.json' is no JSON of ours"):
        unseal(resealed(text), "records/1-1.json", limit_bytes=None)


def test_every_flipped_bit_is_noticed() -> None:
    """format F10"""
    data = seal({"step": 300, "x": [1.5, "y"]})
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptCheckpointError):
            unseal(bytes(damaged), "k")


def test_every_truncation_is_noticed() -> None:
    """format F9"""
    data = seal({"step": 300})
    for size in range(len(data)):
        with pytest.raises(CorruptCheckpointError, match="k"):
            unseal(data[:size], "k")


def test_a_text_over_the_limit_is_refused_before_it_is_parsed() -> None:
    """format F17"""
    fitting = seal({"a": "x" * (LIMIT_BYTES - len(seal({"a": ""})))})
    assert len(fitting) == LIMIT_BYTES == 65536
    unseal(fitting, "k")
    with pytest.raises(CorruptCheckpointError, match="65537 bytes, at most 65536"):
        unseal(seal({"a": "x" * (LIMIT_BYTES - len(seal({"a": ""})) + 1)}), "k")
