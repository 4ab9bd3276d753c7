"""Terms, records and tombstones: every member typed, tied to the object's name and to a version."""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys
from typing import Any

import pytest

from dscheck.errors import CorruptCheckpointError, UnsupportedFormatError
from dscheck.manifest.record import (
    Counts,
    Deletion,
    Digest,
    Pin,
    Record,
    Term,
    Tombstone,
    decode_deletion,
    decode_pin,
    decode_record,
    decode_term,
)
from dscheck.manifest.text import seal, unseal

RECORD = Record(
    *(300, 2, "t2", Digest(10, "a" * 64), Digest(20, "b" * 64), Counts(1, 2, 3, 4, 5)),
    *({"torch": "2.13"}, 1.5, 2.5, "r1", {"loss": 0.5, "spike": None}),
)
TERM = Term(2, "t2", "t1", (1, 200), "host", 1.5)
TOMBSTONE = Tombstone(300, 2, "gc on host", 3.5)
DELETION = Deletion(300, 2, "r1", "rm on host", 4.5)
PIN = Pin(300, 2, "the paper's", "host", 5.5)
DECODE: dict[str, tuple[Any, str]] = {
    "term": (decode_term, "terms/2.json"),
    "record": (decode_record, "records/300-2.json"),
    "tombstone": (decode_record, "records/300-2.json"),
    "deletion": (decode_deletion, "records/300-2.deleted.json"),
    "pin": (decode_pin, "pins/300-2.json"),
}


OBJECTS = {"term": TERM, "record": RECORD, "tombstone": TOMBSTONE, "deletion": DELETION, "pin": PIN}


def changed(data: bytes, **members: Any) -> bytes:
    """The sealed object with other members; `...` leaves one out."""
    body = unseal(data, "k") | members
    return seal({name: value for name, value in body.items() if value is not ...})


def nested(data: bytes, name: str, **members: Any) -> bytes:
    inner = {k: v for k, v in (unseal(data, "k")[name] | members).items() if v is not ...}
    return changed(data, **{name: inner})


def test_what_is_encoded_is_decoded() -> None:
    """format F18, F21, F22, F23, F25, F26, F27"""
    assert decode_record(RECORD.encode(), "records/300-2.json") == RECORD
    assert decode_record(TOMBSTONE.encode(), "records/300-2.json") == TOMBSTONE
    assert decode_term(TERM.encode(), "terms/2.json") == TERM
    assert decode_term(dataclasses.replace(TERM, parent=None).encode(), "terms/2.json").parent is None


def test_a_record_has_exactly_the_members_of_the_format() -> None:
    """format F14, F21, F22, F23, F25, F26"""
    body = json.loads(RECORD.encode())
    assert body.pop("sha256")
    assert body == {
        "version": 1,
        "requires": [],
        "kind": "record",
        "step": 300,
        "term": 2,
        "term_id": "t2",
        "id": "r1",
        "plan": {"size": 10, "sha256": "a" * 64},
        "files": {"size": 20, "sha256": "b" * 64},
        "counts": {"tensors": 1, "fragments": 2, "ranks": 3, "blocks": 4, "bytes": 5},
        "versions": {"torch": "2.13"},
        "started": 1.5,
        "committed": 2.5,
        "metrics": {"loss": 0.5, "spike": None},
    }


def test_a_term_and_a_tombstone_have_exactly_the_members_of_the_format() -> None:
    """format F14, F18, F19, F27"""
    term, tombstone = json.loads(TERM.encode()), json.loads(TOMBSTONE.encode())
    assert term.pop("sha256")
    assert tombstone.pop("sha256")
    common = {"version": 1, "requires": []}
    parent = {"term": 1, "step": 200}
    assert term == {
        **common,
        "kind": "term",
        "term": 2,
        "id": "t2",
        "run": "t1",
        "parent": parent,
        "host": "host",
        "time": 1.5,
    }
    assert tombstone == {**common, "kind": "tombstone", "step": 300, "term": 2, "by": "gc on host", "time": 3.5}


def test_a_deletion_and_a_pin_have_exactly_the_members_of_the_format() -> None:
    """format F14, F107, F109"""
    common = {"version": 1, "requires": [], "step": 300, "term": 2}
    deletion, pin = json.loads(DELETION.encode()), json.loads(PIN.encode())
    assert deletion.pop("sha256")
    assert pin.pop("sha256")
    assert deletion == {**common, "kind": "deletion", "id": "r1", "by": "rm on host", "time": 4.5}
    assert pin == {**common, "kind": "pin", "note": "the paper's", "by": "host", "time": 5.5}
    assert decode_deletion(DELETION.encode(), "records/300-2.deleted.json") == DELETION
    assert decode_pin(PIN.encode(), "pins/300-2.json") == PIN


def test_metrics_are_numbers_or_null() -> None:
    """format F106"""
    for wrong in ({"loss": "0.5"}, {"loss": True}, {"loss": [1]}, [], None, ...):
        with pytest.raises(CorruptCheckpointError, match="metrics"):
            decode_record(changed(RECORD.encode(), metrics=wrong), "records/300-2.json")
    whole = decode_record(changed(RECORD.encode(), metrics={"n": 3}), "records/300-2.json")
    assert isinstance(whole, Record)
    assert whole.metrics == {"n": 3.0}


@pytest.mark.parametrize("kind", DECODE)
@pytest.mark.parametrize("members", [{"version": 2}, {"version": 0}, {"requires": ["planes"]}])
def test_another_version_is_named_as_such(kind: str, members: dict[str, Any]) -> None:
    """format F15"""
    decode, key = DECODE[kind]
    with pytest.raises(UnsupportedFormatError, match="use a newer one") as caught:
        decode(changed(OBJECTS[kind].encode(), **members), key)
    assert pickle.loads(pickle.dumps(caught.value)).key == key


def test_unknown_members_are_ignored() -> None:
    """format F16"""
    data = nested(changed(RECORD.encode(), colour="red"), "counts", dreams=7)
    assert decode_record(data, "records/300-2.json") == RECORD


@pytest.mark.parametrize("kind", ["term", "objects", "Record", ""])
def test_an_object_of_another_kind_is_refused(kind: str) -> None:
    """format F14, F21"""
    with pytest.raises(CorruptCheckpointError, match="record or tombstone expected"):
        decode_record(changed(RECORD.encode(), kind=kind), "records/300-2.json")


@pytest.mark.parametrize("key", ["records/301-2.json", "records/300-3.json", "terms/2.json", "records/0300-2.json"])
def test_a_record_under_another_name_is_refused(key: str) -> None:
    """format F22, F27, F107, F109"""
    for kind in ("deletion", "pin"):
        with pytest.raises(CorruptCheckpointError, match="name says another"):
            DECODE[kind][0](OBJECTS[kind].encode(), key)
    for data in (RECORD.encode(), TOMBSTONE.encode()):
        with pytest.raises(CorruptCheckpointError, match="name says another"):
            decode_record(data, key)


def test_a_term_under_another_name_is_refused() -> None:
    """format F18"""
    with pytest.raises(CorruptCheckpointError, match="name says another"):
        decode_term(TERM.encode(), "terms/3.json")


@pytest.mark.parametrize("term", [2, 3])
def test_a_term_continues_only_from_a_lower_one(term: int) -> None:
    """format F19, F20"""
    with pytest.raises(CorruptCheckpointError, match="one below 2 expected"):
        decode_term(nested(TERM.encode(), "parent", term=term), "terms/2.json")


WRONG = {
    "count": [True, -1, 2**63 - 0.5, "1", None, [1], ...],
    "text": [1, None, ["x"], ...],
    "number": ["1", True, None, {}, ...],
    "object": [1, "x", None, [], ...],
}
MEMBERS = {
    "term": {"term": "count", "id": "text", "run": "text", "host": "text", "time": "number"},
    "tombstone": {"step": "count", "term": "count", "by": "text", "time": "number"},
    "deletion": {"step": "count", "term": "count", "id": "text", "by": "text", "time": "number"},
    "pin": {"step": "count", "term": "count", "note": "text", "by": "text", "time": "number"},
    "record": {
        "step": "count",
        "term": "count",
        "term_id": "text",
        "plan": "object",
        "files": "object",
        "counts": "object",
        "versions": "object",
        "started": "number",
        "committed": "number",
        "id": "text",
    },
}


@pytest.mark.parametrize("kind", MEMBERS)
def test_every_member_has_its_type(kind: str) -> None:
    """format F14, F18, F22, F23, F25, F26, F27, F107, F109"""
    data, (decode, key) = OBJECTS[kind].encode(), DECODE[kind]
    for name, kind_of_member in {**MEMBERS[kind], "version": "count", "requires": "object", "kind": "text"}.items():
        for wrong in WRONG[kind_of_member]:
            if (name, wrong) == ("requires", []):
                continue
            with pytest.raises(CorruptCheckpointError, match=name):
                decode(changed(data, **{name: wrong}), key)


@pytest.mark.parametrize("name", ["plan", "files"])
@pytest.mark.parametrize(
    "members", [{"size": -1}, {"size": "1"}, {"sha256": "A" * 64}, {"sha256": "a" * 63}, {"sha256": ...}]
)
def test_a_digest_is_a_size_and_64_hex_digits(name: str, members: dict[str, Any]) -> None:
    """format F23"""
    with pytest.raises(CorruptCheckpointError, match=rf"{name}\.(size|sha256)"):
        decode_record(nested(RECORD.encode(), name, **members), "records/300-2.json")


@pytest.mark.parametrize("name", ["tensors", "fragments", "ranks", "blocks", "bytes"])
def test_counts_are_counts(name: str) -> None:
    """format F25"""
    for wrong in WRONG["count"]:
        with pytest.raises(CorruptCheckpointError, match=rf"counts\.{name}"):
            decode_record(nested(RECORD.encode(), "counts", **{name: wrong}), "records/300-2.json")


def test_versions_are_strings() -> None:
    """format F26"""
    with pytest.raises(CorruptCheckpointError, match="versions"):
        decode_record(changed(RECORD.encode(), versions={"torch": 2.13}), "records/300-2.json")


def test_listing_steps_needs_no_pyarrow_and_no_numpy() -> None:
    code = (
        "import sys, dscheck.manifest.record, dscheck.manifest.keys, dscheck.manifest.text; "
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert {"numpy", "pyarrow", "torch"}.isdisjoint(printed.split())
