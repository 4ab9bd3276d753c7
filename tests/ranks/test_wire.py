from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dscheck import errors
from dscheck.errors import DscheckError
from dscheck.layout.region import Region
from dscheck.ranks.wire import open_answer, seal_answer, seal_error

CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, DscheckError)]
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.lists(inner).map(tuple),
    max_leaves=10,
)


def carried(error: DscheckError) -> DscheckError:
    with pytest.raises(DscheckError) as caught:
        open_answer(seal_error(error))
    return caught.value


@given(st.binary())
def test_an_answer_comes_out_as_it_went_in(payload: bytes) -> None:
    assert open_answer(seal_answer(payload)) == payload


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_class_crosses_the_wire(kind: type[DscheckError]) -> None:
    error = carried(kind("what, where, what to do", ranks=(1, 2), key="records/3-1.json"))
    assert type(error) is kind
    assert str(error) == "what, where, what to do"
    assert error.fields == {"ranks": (1, 2), "key": "records/3-1.json"}


@given(PLAIN)
def test_plain_fields_keep_value_and_type(value: Any) -> None:
    if isinstance(value, dict) and "$" in value:
        return
    back = carried(DscheckError("x", value=value)).fields["value"]
    assert repr(back) == repr(value)


def test_regions_keep_their_type_and_non_finite_floats_their_value() -> None:
    fields = carried(DscheckError("x", region=Region((0, 1), (2, 3)), inf=-math.inf, nan=math.nan)).fields
    assert fields["region"] == Region((0, 1), (2, 3))
    assert fields["inf"] == -math.inf
    assert math.isnan(fields["nan"])


@pytest.mark.parametrize("value", [b"bytes", {1: 2}, {"$": "tuple", "v": [1]}, object, {1, 2}])
def test_what_is_not_plain_arrives_as_its_repr(value: Any) -> None:
    assert carried(DscheckError("x", value=value)).fields == {"value": repr(value)}


@pytest.mark.parametrize("name", ["NoSuchError", "Any", "annotations", "__name__"])
def test_a_name_that_is_no_error_class_becomes_a_dscheck_error(name: str) -> None:
    sealed = seal_error(DscheckError("x")).replace(b'"DscheckError"', f'"{name}"'.encode())
    with pytest.raises(DscheckError) as caught:
        open_answer(sealed)
    assert type(caught.value) is DscheckError
