"""Names of objects: one way to write each, and no second way to read it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dscheck.commit.history import read_history
from dscheck.errors import CorruptCheckpointError, StorageError
from dscheck.manifest import keys
from dscheck.storage.local import LocalStorage
from tests.manifest.plain_reader import read
from tests.manifest.samples import Step, model, put_term

numbers = st.integers(0, keys.LARGEST)


def test_keys_are_those_of_the_format() -> None:
    """format F1, F3"""
    assert keys.term_key(2) == "terms/2.json"
    assert keys.plan_key(2, "ab" * 32) == f"plans/2-{'ab' * 32}.arrow"
    assert keys.data_key(300, 2, 11) == "steps/300/2/data-11.bin"
    assert keys.files_key(300, 2) == "steps/300/2/files.arrow"
    assert keys.record_key(300, 2) == "records/300-2.json"
    assert keys.data_key(300, 2, 0).startswith(keys.attempt_prefix(300, 2))
    assert keys.deletion_key(300, 2) == "records/300-2.deleted.json"
    assert keys.pin_key(300, 2) == "pins/300-2.json"


@given(numbers, numbers)
def test_listed_names_give_back_their_numbers(step: int, term: int) -> None:
    """format F4"""
    assert keys.parse_record_key(keys.record_key(step, term)) == (step, term)
    assert keys.parse_term_key(keys.term_key(term)) == term
    assert keys.parse_deletion_key(keys.deletion_key(step, term)) == (step, term)
    assert keys.parse_pin_key(keys.pin_key(step, term)) == (step, term)
    assert keys.parse_attempt_key(keys.data_key(step, term, 7)) == (step, term)
    assert keys.parse_attempt_key(keys.files_key(step, term)) == (step, term)
    assert keys.parse_plan_key(keys.plan_key(term, "0f" * 32)) == term


@pytest.mark.parametrize(
    "name",
    [
        "01-2",
        "1-02",
        "+1-2",
        "-1-2",
        "1-2 ",
        "1_0-2",
        "1",
        "1-2-3",
        "",
        "\u0661-2",
        f"{2**63}-1",
        f"1-{2**63}",
        "1.0-2",
    ],
)
def test_other_spellings_of_a_number_are_no_record(name: str) -> None:
    """format F4"""
    assert keys.parse_record_key(f"records/{name}.json") is None
    assert keys.parse_record_key(f"records/{name}.json\n") is None
    assert keys.parse_deletion_key(f"records/{name}.deleted.json") is None
    assert keys.parse_pin_key(f"pins/{name}.json") is None
    assert keys.parse_attempt_key(f"steps/{name.replace('-', '/')}/files.arrow") is None


@pytest.mark.parametrize("key", ["terms/01.json", "terms/1.json.tmp", "term/1.json", "terms/+1.json", "terms/a/1.json"])
def test_other_names_are_no_term(key: str) -> None:
    """format F4"""
    assert keys.parse_term_key(key) is None


@pytest.mark.parametrize("number", [-1, 2**63, True, 1.0, "1", None])
def test_what_is_no_number_makes_no_key(number: object) -> None:
    """format F4"""
    with pytest.raises(ValueError, match="int from 0"):
        keys.record_key(number, 1)  # type: ignore[arg-type]


def test_names_with_a_dot_in_front_are_not_there(tmp_path: Path) -> None:
    """format F2, F3"""
    put_term(tmp_path, 1)
    Step(5, 1, model()).write(tmp_path)
    for stray in (
        "records/.9-1.json",
        "terms/.9.json",
        ".records/9-1.json",
        "steps/5/notes.txt",
        "steps/5/1/.data-9.bin",
    ):
        (tmp_path / stray).parent.mkdir(exist_ok=True)
        (tmp_path / stray).write_bytes(b"half an object")
    assert keys.parse_record_key("records/.9-1.json") is None
    assert keys.parse_term_key("terms/.9.json") is None
    assert not any(
        ".9" in entry.key for folder in ("records/", "terms/") for entry in LocalStorage(tmp_path).list(folder)
    )
    assert read(tmp_path).record["step"] == 5


@pytest.mark.parametrize("stray", ["records/notes.txt", "records/05-1.json", "terms/1.json.bak"])
def test_other_names_among_terms_and_records_are_damage(tmp_path: Path, stray: str) -> None:
    """format F3, F4"""
    put_term(tmp_path, 1)
    Step(5, 1, model()).write(tmp_path)
    (tmp_path / stray).write_bytes(b"notes")
    with pytest.raises(ValueError, match="the name"):
        read(tmp_path)
    with pytest.raises(CorruptCheckpointError):
        read_history(LocalStorage(tmp_path))


def test_no_object_names_another_by_its_key(tmp_path: Path) -> None:
    """format F5"""
    put_term(tmp_path, 1)
    Step(5, 1, model()).write(tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    contents = b"".join(path.read_bytes() for path in files)
    assert len(files) == 6
    for path in files:
        assert str(path.relative_to(tmp_path)).encode() not in contents
        assert path.name.encode() not in contents


def test_an_object_is_created_once(tmp_path: Path) -> None:
    """format F6"""
    storage = LocalStorage(tmp_path)
    key = keys.record_key(5, 1)
    assert storage.put_if_absent(key, b"first")
    assert not storage.put_if_absent(key, b"second")
    with pytest.raises(StorageError):
        storage.create(key).commit()
    assert storage.read(key) == b"first"
