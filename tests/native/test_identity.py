"""A look at an object graph sees every change of it, and keeps nothing alive."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict, UserDict
from typing import Any

import pytest

from dscheck.native import Anything, At, Entries, Equal, Kind, Members, Node, Same, Standing, look


class Thing:
    """Something that can be referred to weakly, and owns attributes."""


class Slotted:
    __slots__ = ("__weakref__", "value")


def root(value: Any, node: Node) -> tuple[Any, list[Standing]]:
    """An owner of `value`, and the record that it has what `node` says."""
    owner = Thing()
    owner.value = value  # type: ignore[attr-defined]
    return owner, [Standing(owner, {"value": node})]


def test_same_is_the_very_object() -> None:
    one, other = Thing(), Thing()
    owner, roots = root(one, Same(one))
    assert look(roots) == {}
    owner.value = other
    assert look(roots) is None
    owner.value = one
    assert look(roots) == {}


def test_an_object_made_in_the_place_of_a_dead_one_is_another() -> None:
    """Same must not believe an address: Python reuses them at once."""
    thing = Thing()
    owner, roots = root(thing, Same(thing))
    address = id(thing)
    del thing
    owner.value = None
    made = []
    while not made or id(made[-1]) != address:
        made.append(Thing())
        assert len(made) < 100_000
    owner.value = made[-1]
    assert look(roots) is None


def test_at_is_the_object_at_the_address() -> None:
    one = Thing()
    owner, roots = root([one, 3], Entries([one, 3], [At(one), Anything()]))
    assert look(roots) == {}
    owner.value[0] = Thing()
    assert look(roots) is None
    owner, roots = root(one, At(one))
    assert look(roots) == {}
    owner.value = None
    assert look(roots) is None


def test_kind_is_exactly_a_type_and_gives_back_what_is_wanted() -> None:
    owner, roots = root(1, Kind(int, "number"))
    assert look(roots) == {"number": 1}
    owner.value = 2
    assert look(roots) == {"number": 2}
    for other in (True, 1.0, "1", None):
        owner.value = other
        assert look(roots) is None
    owner, roots = root(1, Kind(int))
    assert look(roots) == {}


def test_equal_compares_by_value() -> None:
    owner, roots = root({"a"}, Equal(frozenset({"a"})))
    assert look(roots) == {}
    owner.value.add("b")
    assert look(roots) is None


NODES = [Kind(int, "a"), Kind(int, "b")]
CHANGES: list[Any] = [
    lambda d: d.update(c=3),
    lambda d: d.pop("a"),
    lambda d: d.update(b="text"),
    lambda d: (d.pop("a"), d.update(a=1)),
    lambda d: (d.pop("b"), d.update(c=2)),
    lambda d: d.clear(),
]


@pytest.mark.parametrize("kind", [dict, OrderedDict, UserDict])
@pytest.mark.parametrize("change", CHANGES)
def test_entries_of_a_mapping_are_counted_and_compared_in_order_with_their_keys(kind: Any, change: Any) -> None:
    owner, roots = root(kind(a=1, b=2), Entries(kind(a=1, b=2), NODES))
    assert look(roots) == {"a": 1, "b": 2}
    change(owner.value)
    assert look(roots) is None


@pytest.mark.parametrize("kind", [list, tuple])
def test_entries_of_a_sequence(kind: Any) -> None:
    owner, roots = root(kind((1, 2)), Entries(kind((1, 2)), NODES))
    assert look(roots) == {"a": 1, "b": 2}
    for other in ((1,), (1, 2, 3), (1, "2"), ()):
        owner.value = kind(other)
        assert look(roots) is None


def test_a_container_of_another_type_is_another_one() -> None:
    owner, roots = root({}, Entries({}, []))
    assert look(roots) == {}
    for other in (OrderedDict(), [], None, 3):
        owner.value = other
        assert look(roots) is None


def test_an_empty_container_that_is_filled_is_seen() -> None:
    for empty in ({}, OrderedDict(), [], UserDict()):
        owner, roots = root(empty, Entries(empty, []))
        assert look(roots) == {}
        owner.value.append(1) if isinstance(empty, list) else owner.value.update(a=1)
        assert look(roots) is None


def test_keys_that_are_objects_are_compared_by_identity() -> None:
    one, other = Thing(), Thing()
    owner, roots = root({one: 1}, Entries({one: 1}, [Anything()]))
    assert look(roots) == {}
    owner.value = {other: 1}
    assert look(roots) is None


def test_members_are_a_part_of_a_dict() -> None:
    owner, roots = root({"a": 1, "b": 2}, Members({"a": Kind(int, "a")}))
    assert look(roots) == {"a": 1}
    owner.value = {"c": 3, "a": 4}
    assert look(roots) == {"a": 4}
    for other in ({"b": 2}, {"a": "text"}, [], None):
        owner.value = other
        assert look(roots) is None


def test_too_few_nodes_are_refused() -> None:
    with pytest.raises(ValueError, match="a node for every entry"):
        Entries([1, 2], [Anything()])


def test_what_has_no_weak_reference_cannot_be_recorded() -> None:
    for make in (lambda: Same(3), lambda: Standing(3, {})):
        with pytest.raises(TypeError, match="weak reference"):
            make()


def test_attributes_in_slots_are_read_too() -> None:
    owner = Slotted()
    owner.value = 1
    roots = [Standing(owner, {"value": Kind(int, "value")})]
    assert look(roots) == {"value": 1}
    owner.value = "text"
    assert look(roots) is None


def test_an_attribute_that_is_gone_raises_nothing_to_the_caller() -> None:
    owner, roots = root(1, Kind(int))
    del owner.value
    assert look(roots) is None


def test_absent_attributes_are_those_of_the_object_itself() -> None:
    owner = Thing()
    roots = [Standing(owner, {}, ("__init__", "later"))]
    assert look(roots) == {}
    owner.later = 1  # type: ignore[attr-defined]
    assert look(roots) is None


def test_another_class_of_the_same_object_is_seen() -> None:
    owner, roots = root(1, Anything())
    owner.__class__ = type("Other", (Thing,), {})
    assert look(roots) is None


def test_a_record_keeps_nothing_alive_and_sees_what_is_gone() -> None:
    class Held(Thing):
        pass

    owner, value, key = Held(), Held(), Held()
    owner.value, owner.keys = [value], {key: 1}  # type: ignore[attr-defined]
    roots = [
        Standing(owner, {"value": Entries([value], [Same(value)]), "keys": Entries(owner.keys, [Anything()])})  # type: ignore[attr-defined]
    ]
    gone = [weakref.ref(thing) for thing in (owner, value, key)]
    assert look(roots) == {}
    del owner, value, key
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3
    assert look(roots) is None
