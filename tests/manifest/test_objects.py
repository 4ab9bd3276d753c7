"""Plain data keeps its types, bits and order; everything else is refused by path."""

from __future__ import annotations

import datetime
import enum
import functools
import json
import math
import pathlib
import struct
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dscheck.errors import CorruptCheckpointError, StateError
from dscheck.manifest.arrays import NUMPY_DTYPES
from dscheck.manifest.dtypes import ITEMSIZE
from dscheck.manifest.objects import Array, Later, decode_object, decode_objects, encode_object, encode_objects
from dscheck.manifest.tags import MAX_DEPTH
from dscheck.manifest.text import seal, unseal
from tests.manifest import plain_reader


def through_text(value: Any) -> Any:
    """The tagged form after a trip through sealed text."""
    return unseal(seal({"v": encode_object(value, "x")}), "k", None)["v"]


def round_trip(value: Any) -> Any:
    return decode_object(through_text(value))


def same(a: Any, b: Any) -> bool:
    """Equal, type by type, bit by bit, in order."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack("<d", a) == struct.pack("<d", b) or (math.isnan(a) and math.isnan(b))
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, defaultdict) and a.default_factory is not b.default_factory:
        return False
    if isinstance(a, deque) and a.maxlen != b.maxlen:
        return False
    if isinstance(a, dict):
        return same(list(a.items()), list(b.items()))
    if isinstance(a, list | tuple | deque):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, set | frozenset):
        return len(a) == len(b) and all(any(same(x, y) for y in b) for x in a)
    return bool(a == b)


arrays = st.tuples(
    st.sampled_from(sorted(NUMPY_DTYPES - {"bool"})), st.lists(st.integers(0, 3), max_size=3), st.binary(min_size=432)
).map(lambda parts: np.frombuffer(parts[2][: 16 * 27], parts[0])[: math.prod(parts[1])].reshape(parts[1]))
floats = st.binary(min_size=8, max_size=8).map(lambda raw: struct.unpack("<d", raw)[0]) | st.floats()
hashables = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | floats
    | st.text(max_size=4)
    | st.binary(max_size=4)
    | st.complex_numbers(),
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=4,
)
objects = st.recursive(
    hashables | arrays | arrays.filter(lambda a: a.size).map(lambda a: a.ravel()[0]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.lists(inner, max_size=4).map(deque),
        st.tuples(st.lists(inner, max_size=2), st.integers(2, 5)).map(lambda parts: deque(*parts)),
        st.dictionaries(st.text(max_size=3) | st.just("$"), inner, max_size=4),
        st.dictionaries(hashables, inner, max_size=4),
        st.dictionaries(hashables, inner, max_size=4).map(OrderedDict),
        st.dictionaries(hashables, inner, max_size=4).map(Counter),
        st.dictionaries(hashables, inner, max_size=4).map(lambda d: defaultdict(list, d)),
        st.sets(hashables, max_size=4),
    ),
    max_leaves=12,
)


@given(objects)
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_every_plain_object_comes_back_as_it_was(value: Any) -> None:
    """format F73, F74, F75, F79, F80, F81, F82, F83, F84, F85, F86, F87, F88, F89, F90, F91"""
    assert same(round_trip(value), value)
    assert same(plain_reader.plain(through_text(value)), value)


EXAMPLES: dict[str, tuple[Any, Any]] = {
    "tuple": ((1, "a"), {"$": "tuple", "v": [1, "a"]}),
    "dict": ({(1, "a"): 2}, {"$": "dict", "v": [[{"$": "tuple", "v": [1, "a"]}, 2]]}),
    "dict with $": ({"$": 1}, {"$": "dict", "v": [["$", 1]]}),
    "OrderedDict": (OrderedDict(b=1, a=2), {"$": "OrderedDict", "v": [["b", 1], ["a", 2]]}),
    "Counter": (Counter({80: 1, 160: 2}), {"$": "Counter", "v": [[80, 1], [160, 2]]}),
    "defaultdict": (defaultdict(list, {1: [2]}), {"$": "defaultdict", "v": [[1, [2]]], "factory": "list"}),
    "defaultdict of none": (defaultdict(None), {"$": "defaultdict", "v": [], "factory": "none"}),
    "deque": (deque([1], 3), {"$": "deque", "v": [1], "maxlen": 3}),
    "deque without maxlen": (deque([1]), {"$": "deque", "v": [1], "maxlen": None}),
    "set": ({3, 20, 1}, {"$": "set", "v": [1, 20, 3]}),
    "frozenset": (frozenset("a"), {"$": "frozenset", "v": ["a"]}),
    "bytes": (b"\0\xff", {"$": "bytes", "v": "AP8="}),
    "int": (2**64, {"$": "int", "v": "0x10000000000000000"}),
    "negative int": (-(2**63) - 1, {"$": "int", "v": "-0x8000000000000001"}),
    "nan": (math.nan, {"$": "float", "v": "nan"}),
    "inf": (-math.inf, {"$": "float", "v": "-inf"}),
    "complex": (complex(1, math.inf), {"$": "complex", "v": [1.0, {"$": "float", "v": "inf"}]}),
    "array": (
        np.array([[1, 2]], "<i2"),
        {"$": "array", "lib": "numpy", "dtype": "int16", "shape": [1, 2], "data": "AQACAA=="},
    ),
    "scalar": (
        np.float32(1.5),
        {"$": "array", "lib": "numpy.scalar", "dtype": "float32", "shape": [], "data": "AADAPw=="},
    ),
    "plain": ([None, True, 1, 1.0, "é", {"b": 1, "a": {}}], [None, True, 1, 1.0, "é", {"b": 1, "a": {}}]),
}


@pytest.mark.parametrize(("value", "tagged"), EXAMPLES.values(), ids=EXAMPLES)
def test_each_tag_has_the_form_of_the_format(value: Any, tagged: Any) -> None:
    """format F73, F74, F75, F79, F80, F81, F82, F83, F84, F85, F86, F87, F88, F89, F90, F91"""
    assert encode_object(value, "x") == tagged
    assert same(decode_object(tagged), value)
    assert json.dumps(encode_object(value, "x")) == json.dumps(tagged)


@pytest.mark.parametrize("number", [0.0, -0.0, 5e-324, 1e22, 0.1, 1.7976931348623157e308, 1.0])
def test_finite_floats_are_plain_and_exact(number: float) -> None:
    """format F12, F73"""
    assert type(encode_object(number, "x")) is float
    assert same(round_trip(number), number)


def test_dicts_keep_their_order() -> None:
    """format F13, F75"""
    assert list(round_trip({"z": 1, "a": 2, "m": 3})) == ["z", "a", "m"]


def test_sets_have_one_text_whatever_their_history() -> None:
    """format F83"""
    ascending, descending = set(), set()
    for i in range(100):
        ascending.add(f"name {i}")
        descending.add(f"name {99 - i}")
    assert json.dumps(encode_object(ascending, "x")) == json.dumps(encode_object(descending, "x"))


def test_what_is_encoded_shares_nothing_with_the_live_object() -> None:
    live = {"a": [1], "b": np.zeros(2)}
    tagged = encode_object(live, "x")
    live["a"].append(2)
    live["b"][0] = 7
    assert same(decode_object(tagged), {"a": [1], "b": np.zeros(2)})


def test_what_is_made_later_is_made_where_it_is_written() -> None:
    made: list[str] = []

    def later(value: Any, path: str) -> Later | None:
        return Later(lambda: made.append(path) or encode_object((1, 2), path))

    encoded = encode_object({"a": [object()], "b": {object()}}, "x", later)
    options = {"adam": dict.fromkeys(("p", "q"), encode_object({"lr": object()}, "lr", later))}
    assert made == ["x['b'][0]"]  # a set is put in order by its text
    objects, read = decode_objects(encode_objects({"x": encoded}, options), "data")
    assert decode_object(objects["x"]) == {"a": [(1, 2)], "b": {(1, 2)}}
    assert decode_object(read["adam"]["q"]) == {"lr": (1, 2)}
    assert made[1:] == ["lr['lr']", "x['a'][0]", "x['b'][0]"]


def test_decoded_arrays_are_writable() -> None:
    found = round_trip({"a": np.arange(3)})
    found["a"][0] = 5
    assert found["a"][0] == 5


def test_strided_and_big_endian_arrays_keep_their_values() -> None:
    """format F90"""
    value = np.arange(12, dtype=">i4").reshape(3, 4).T[::2]
    found = round_trip(value)
    assert found.tolist() == value.tolist()
    assert found.dtype == np.dtype("int32")


class Colour(enum.IntEnum):
    RED = 1


class Name(str):
    __slots__ = ()


class Own(dict[str, int]):
    pass


class Half(np.float16):
    pass


Point = namedtuple("Point", "x y")
REFUSED: dict[str, Any] = {
    "int subclass": Colour.RED,
    "str subclass": Name("x"),
    "dict subclass": Own(a=1),
    "namedtuple": Point(1, 2),
    "function": len,
    "lambda": lambda: 0,
    "partial": functools.partial(int),
    "class": int,
    "module": math,
    "date": datetime.date(2026, 1, 1),
    "path": pathlib.PurePath("x"),
    "range": range(3),
    "slice": slice(3),
    "bytearray": bytearray(b"x"),
    "iterator": iter([]),
    "object": object(),
    "ellipsis": ...,
    "object array": np.array([None]),
    "string array": np.array(["x"]),
    "record array": np.zeros(1, [("a", "i4")]),
    "masked array": np.ma.zeros(2),
    "datetime64": np.datetime64("2026-01-01"),
    "long double": np.longdouble(1),
    "np.float16 subclass": Half(1),
    "np.void": np.void(b"xx"),
    "np.str_": np.str_("x"),
    "dtype": np.dtype("int8"),
    "defaultdict of a lambda": defaultdict(lambda: 0),
}


@pytest.mark.parametrize("value", REFUSED.values(), ids=REFUSED)
def test_what_is_not_plain_is_refused_by_path_and_type(value: Any) -> None:
    """format F92"""
    state = {"milestones": (0, 1, [value])}
    with pytest.raises(StateError) as caught:
        encode_object(state, "scheduler")
    assert caught.value.path == "scheduler['milestones'][2][0]"
    assert str(caught.value).startswith("scheduler['milestones'][2][0] is a ")
    assert type(value).__name__ in caught.value.type


def test_a_key_that_is_not_plain_is_refused_by_path() -> None:
    """format F92"""
    with pytest.raises(StateError, match=r"x\[<Colour.RED: 1>\] is a .*Colour"):
        encode_object({Colour.RED: 1}, "x")


def test_cycles_are_refused() -> None:
    """format F92"""
    loop: list[Any] = [1]
    loop.append({"again": loop})
    with pytest.raises(StateError, match=r"x\[1\]\['again'\] is a list that contains itself"):
        encode_object(loop, "x")


def test_one_object_in_two_places_is_no_cycle() -> None:
    shared = [1]
    assert encode_object([shared, (shared,)], "x") == [[1], {"$": "tuple", "v": [[1]]}]


@pytest.mark.parametrize(
    "wrap", [lambda v: [v], lambda v: (v,), lambda v: {1: v}, lambda v: {"a": v}, lambda v: {"$": v}]
)
def test_nesting_has_a_limit_that_text_and_decoder_share(wrap: Any) -> None:
    """format F77"""
    value: Any = complex(math.nan, math.inf)
    for _ in range(MAX_DEPTH):
        value = wrap(value)
    assert MAX_DEPTH == 64
    assert same(round_trip(value), value)
    with pytest.raises(StateError, match="nested in 64 others"):
        encode_object(wrap(value), "x")
    tagged: Any = 0
    for _ in range(MAX_DEPTH + 5):
        tagged = wrap(tagged) if type(wrap(0)) is list else [tagged]
    with pytest.raises(CorruptCheckpointError, match="nested deeper"):
        decode_object(tagged)


def test_torch_tensors_go_through_the_callbacks() -> None:
    """format F91"""

    class Tensor:
        pass

    def take_apart(value: Any, path: str) -> Array | None:
        assert path == "x['a'][0]"
        return Array("torch", "bfloat16", (2,), b"\0\1\2\3") if isinstance(value, Tensor) else None

    tagged = encode_object({"a": [Tensor()]}, "x", take_apart)
    assert tagged["a"][0] == {"$": "array", "lib": "torch", "dtype": "bfloat16", "shape": [2], "data": "AAECAw=="}
    assert decode_object(tagged) == {"a": [Array("torch", "bfloat16", (2,), b"\0\1\2\3")]}
    assert decode_object(tagged, array=lambda array: array.shape) == {"a": [(2,)]}
    with pytest.raises(StateError, match=r"x\['a'\]\[0\]"):
        encode_object({"a": [object()]}, "x", take_apart)


def array_of(**members: Any) -> dict[str, Any]:
    return {"$": "array", "lib": "numpy", "dtype": "int16", "shape": [1, 2], "data": "AQACAA==", **members}


DAMAGED: dict[str, Any] = {
    "unknown tag": {"$": "set2", "v": []},
    "no tag": {"$": None, "v": []},
    "tag of another type": {"$": ["set"], "v": []},
    "pickle": {"$": "pickle", "v": "gASVAA=="},
    "missing member": {"$": "deque", "v": []},
    "member too many": {"$": "tuple", "v": [], "w": 1},
    "tuple of a string": {"$": "tuple", "v": "ab"},
    "tuple of a dict": {"$": "tuple", "v": {}},
    "dict of singles": {"$": "dict", "v": [[1]]},
    "dict of strings": {"$": "dict", "v": ["ab"]},
    "dict of a dict": {"$": "dict", "v": {"a": 1}},
    "key twice": {"$": "dict", "v": [[1, 1], [1.0, 2]]},
    "key that cannot be one": {"$": "dict", "v": [[[], 1]]},
    "element twice": {"$": "set", "v": [1, True]},
    "element that cannot be one": {"$": "frozenset", "v": [{}]},
    "factory by name": {"$": "defaultdict", "v": [], "factory": "os.system"},
    "factory of another type": {"$": "defaultdict", "v": [], "factory": ["list"]},
    "eval as factory": {"$": "defaultdict", "v": [], "factory": "eval"},
    "deque too long": {"$": "deque", "v": [1, 2], "maxlen": 1},
    "maxlen of True": {"$": "deque", "v": [], "maxlen": True},
    "bytes that are no base64": {"$": "bytes", "v": "A!=="},
    "bytes with a line feed": {"$": "bytes", "v": "AP8=\n"},
    "bytes without padding": {"$": "bytes", "v": "AAE"},
    "bytes of a list": {"$": "bytes", "v": [1]},
    "int in decimals": {"$": "int", "v": "12"},
    "int with underscores": {"$": "int", "v": "0x1_0"},
    "int as int": {"$": "int", "v": 12},
    "float by name": {"$": "float", "v": "1.5"},
    "float as float": {"$": "float", "v": 1.5},
    "complex of one": {"$": "complex", "v": [1.0]},
    "complex of ints": {"$": "complex", "v": [1, 2]},
    "array of another library": array_of(lib="cupy"),
    "array of another dtype": array_of(dtype="object"),
    "array of dtype and shape in one": array_of(dtype="(2,)i2"),
    "array of bfloat16 in NumPy": array_of(dtype="bfloat16"),
    "array with bytes missing": array_of(data="AQA="),
    "array with bytes too many": array_of(data="AQACAAMA"),
    "array of a huge shape": array_of(shape=[2**40, 2**40]),
    "array of a huge empty shape": array_of(shape=[0, 2**62, 2**62], data=""),
    "tensor of a huge empty shape": array_of(lib="torch", shape=[0, 2**62, 2**62], data=""),
    "tensor of a shape of bools": array_of(lib="torch", shape=[True, 2]),
    "array of a negative shape": array_of(shape=[-1, -2]),
    "array of a shape of floats": array_of(shape=[1.0, 2.0]),
    "array of a shape of bools": array_of(shape=[True, 2]),
    "array of 65 dimensions": array_of(shape=[1] * 64 + [2]),
    "array without a shape": array_of(shape=None),
    "scalar with a shape": array_of(lib="numpy.scalar"),
    "bool of 2": array_of(dtype="bool", shape=[1], data="Ag=="),
}


@pytest.mark.parametrize("tagged", DAMAGED.values(), ids=DAMAGED)
def test_what_is_not_in_the_format_is_refused(tagged: Any) -> None:
    """format F42, F74, F76, F78, F80, F82, F83, F85, F86, F87, F88, F90, F91"""
    with pytest.raises(CorruptCheckpointError, match=r"'scheduler' is damaged"):
        decode_object([tagged], "scheduler")


def test_keys_that_are_chosen_to_collide_are_refused() -> None:
    """format F78"""
    modulus = 2**61 - 1
    pairs = [[{"$": "int", "v": hex(modulus * (i + 9))}, i] for i in range(20_000)]
    with pytest.raises(CorruptCheckpointError, match="one hash"):
        decode_object({"$": "dict", "v": pairs})
    assert len(decode_object({"$": "dict", "v": pairs[:64]})) == 64


def test_every_dtype_passes_as_a_torch_array() -> None:
    """format F39, F91"""
    for name, size in ITEMSIZE.items():
        array = Array("torch", name, (3,), bytes(3 * size))
        tagged = encode_object(object(), "x", lambda value, path, array=array: array)
        assert decode_object(tagged) == array


def test_ours_and_mine_are_sealed_objects() -> None:
    """format F69, F72, F93"""
    options = {"optimizer": {"model.b": {"lr": 0.1}, "model.a": {"lr": 0.1}, "model.c": {"lr": 1}}, "none": {}}
    data = encode_objects({"b": 1, "a": {"$": "tuple", "v": []}}, options)
    body = json.loads(data)
    assert (body["version"], body["requires"], body["kind"]) == (1, [], "objects")
    assert body["objects"] == {"a": {"$": "tuple", "v": []}, "b": 1}
    assert body["options"]["optimizer"] == {
        "groups": [{"lr": 0.1}, {"lr": 1}],
        "parameters": {"model.a": 0, "model.b": 0, "model.c": 1},
    }
    assert decode_objects(data, "k") == ({"b": 1, "a": {"$": "tuple", "v": []}}, options)
    assert decode_objects(encode_objects({}), "k") == ({}, {})


def test_equal_objects_and_options_are_equal_text() -> None:
    """format F70"""
    assert encode_objects({"a": 1, "b": 2}, {"o": {"p": {}, "q": 1}}) == encode_objects(
        {"b": 2, "a": 1}, {"o": {"q": 1, "p": {}}}
    )


def test_options_of_1_and_true_and_1_0_are_three() -> None:
    """format F93"""
    options = {"o": {"a": {"x": 1}, "b": {"x": True}, "c": {"x": 1.0}, "d": {"x": 1}}}
    found = decode_objects(encode_objects({}, options), "k")[1]
    assert json.dumps(found) == json.dumps(options)


@pytest.mark.parametrize(
    "members",
    [
        {"kind": "record"},
        {"objects": []},
        {"options": None},
        {"options": {"o": {"groups": {}, "parameters": {}}}},
        {"options": {"o": {"groups": [], "parameters": {"p": 0}}}},
        {"options": {"o": {"groups": [1], "parameters": {"p": -1}}}},
        {"options": {"o": {"groups": [1], "parameters": {"p": "0"}}}},
        {"options": {"o": {"parameters": {}}}},
    ],
)
def test_texts_of_another_form_are_refused(members: dict[str, Any]) -> None:
    """format F69, F93"""
    body = {"version": 1, "requires": [], "kind": "objects", "objects": {}, "options": {}, **members}
    with pytest.raises(CorruptCheckpointError, match=r"data-0\.bin"):
        decode_objects(seal(body), "steps/1/1/data-0.bin")


def test_texts_of_objects_have_no_limit() -> None:
    """format F69"""
    data = encode_objects({"a": "x" * 100_000})
    assert decode_objects(data, "k")[0]["a"] == "x" * 100_000
