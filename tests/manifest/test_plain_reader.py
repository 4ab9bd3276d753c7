"""What the format says is enough to read a checkpoint, and to notice every damage, without dscheck."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dscheck.commit.history import read_history
from dscheck.commit.listing import StepRef
from dscheck.manifest.arrow import decode_files
from dscheck.manifest.keys import data_key, deletion_key, files_key, record_key
from dscheck.manifest.record import Deletion, Tombstone
from dscheck.native import crc32c
from dscheck.storage.local import LocalStorage
from tests.manifest import plain_reader
from tests.manifest.plain_reader import read
from tests.manifest.samples import Step, Whole, model, put, put_term

SAMPLE = Step(
    100,
    1,
    model(),
    ours=({"scheduler": {"milestones": (1, 2)}, "loader": 3}, {"scheduler": {"milestones": (1, 2)}, "loader": 4}),
    mine=({"dscheck.rng": b"zero"}, {"dscheck.rng": b"one", "only here": 1.5}),
    options={"optimizer": {"model.bias": {"lr": 0.1}, "model.half": {"lr": 0.1}, "model.wide": {"lr": 0.2}}},
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    put_term(tmp_path, 1)
    SAMPLE.write(tmp_path)
    return tmp_path


def test_the_reader_is_short_and_knows_nothing_of_dscheck() -> None:
    source = Path(plain_reader.__file__).read_text()
    assert len(source.splitlines()) <= 250
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).partition(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert imported.isdisjoint({"dscheck", "torch", "tests"})


def test_every_tensor_comes_back_whole(root: Path) -> None:
    """format F8, F40, F43, F47, F48, F53, F55"""
    found = read(root).tensors
    for name, whole in SAMPLE.tensors.items():
        dtype, array = found[name]
        assert dtype == whole.dtype
        assert array.shape == whole.array.shape
        assert array.tobytes() == whole.array.tobytes()


def test_a_tied_tensor_is_found_by_each_of_its_names(root: Path) -> None:
    """format F36"""
    found = read(root).tensors
    assert found["model.tied.weight"] == found["model.wide"]


def test_elements_are_little_endian_and_complex_ones_begin_with_the_real_part(tmp_path: Path) -> None:
    """format F40, F42"""
    put_term(tmp_path, 1)
    tensors = {
        "c": Whole("complex64", np.array([1 + 2j], "<c8")),
        "i": Whole("int32", np.array([258], "<i4")),
        "b": Whole("bool", np.array([True, False])),
    }
    Step(1, 1, tensors, ranks=1).write(tmp_path)
    found = {name: array.tobytes() for name, (_, array) in read(tmp_path).tensors.items()}
    assert found == {"c": np.array([1, 2], "<f4").tobytes(), "i": b"\x02\x01\0\0", "b": b"\1\0"}


def test_objects_and_options_come_back(root: Path) -> None:
    """format F69, F71, F72, F93"""
    found = read(root)
    assert found.ours == list(SAMPLE.ours)
    assert found.mine == list(SAMPLE.mine)
    assert found.options == [SAMPLE.options, SAMPLE.options]


def test_equal_objects_have_one_digest_on_all_ranks(tmp_path: Path) -> None:
    """format F70"""
    put_term(tmp_path, 1)
    for step, second in ((1, {"b": 2, "a": {3, 1}}), (2, {"a": {3, 1}, "b": 3})):
        Step(step, 1, {}, ours=({"a": {1, 3}, "b": 2}, second)).write(tmp_path)
        rows = decode_files((tmp_path / files_key(step, 1)).read_bytes(), "k")
        assert (rows[0].ours.sha256 == rows[1].ours.sha256) is (step == 1)


def test_a_step_without_tensors_has_a_data_file_for_each_rank(tmp_path: Path) -> None:
    """format F54, F61"""
    put_term(tmp_path, 1)
    Step(1, 1, {}).write(tmp_path)
    assert read(tmp_path).tensors == {}
    assert [(tmp_path / data_key(1, 1, rank)).read_bytes()[:2] for rank in (0, 1)] == [b'{"', b'{"']


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    data = change(path.read_bytes())
    path.unlink()
    path.write_bytes(data)


def flipped(data: bytes, at: int, bit: int = 0) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def test_a_flipped_bit_in_any_byte_that_counts_is_noticed(root: Path) -> None:
    """format F10, F24, F63, F68"""
    plan = SAMPLE.plan()
    rng = np.random.default_rng(3)
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        data = path.read_bytes()
        places = range(len(data))
        if path.suffix == ".bin":
            row = decode_files((root / files_key(100, 1)).read_bytes(), "k")[int(path.stem.removeprefix("data-"))]
            mine = [f for f in plan.fragments if f.writer == row.rank]
            places = [at for f in mine for at in range(f.offset, f.offset + f.nbytes)]
            places += range(row.checksums.offset, len(data))
        for at in rng.choice(places, 12):
            path.write_bytes(flipped(data, at, int(rng.integers(8))))
            with pytest.raises((ValueError, KeyError)):
                read(root)
        path.write_bytes(data)
    assert read(root).record["step"] == 100


def test_the_bytes_between_fragments_mean_nothing(root: Path) -> None:
    """format F57"""
    before = read(root)
    first, second = sorted((f for f in SAMPLE.plan().fragments if f.writer == 0), key=lambda f: f.offset)[:2]
    gap = first.offset + first.nbytes
    assert gap < second.offset
    rewrite(root / data_key(100, 1, 0), lambda data: flipped(data, gap))
    assert read(root).tensors.keys() == before.tensors.keys()


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0"], ids=["shorter", "longer"])
def test_a_data_file_of_another_size_is_noticed(root: Path, change: Callable[[bytes], bytes]) -> None:
    """format F54, F65"""
    rewrite(root / data_key(100, 1, 1), change)
    with pytest.raises(ValueError, match="size of"):
        read(root)


def test_blocks_are_checked_one_by_one(root: Path) -> None:
    """format F58, F59, F60, F61, F62"""
    row = decode_files((root / files_key(100, 1)).read_bytes(), "k")[0]
    data = (root / data_key(100, 1, 0)).read_bytes()
    plan = SAMPLE.plan()
    mine = sorted((f for f in plan.fragments if f.writer == 0), key=lambda f: f.offset)
    expected = []
    for f in mine:
        assert f.first_block == len(expected)
        raw = data[f.offset : f.offset + f.nbytes]
        expected += [plain_reader.crc32c(raw[i : i + plan.block_bytes]) for i in range(0, f.nbytes, plan.block_bytes)]
    assert row.blocks == len(expected) > len(mine)
    assert row.checksums.offset == -(-(mine[-1].offset + mine[-1].nbytes) // 8) * 8
    stored = data[row.checksums.offset : row.checksums.end]
    assert stored == b"".join(value.to_bytes(4, "little") for value in expected)


def test_the_checksum_is_crc32c() -> None:
    """format F62"""
    assert plain_reader.crc32c(b"123456789") == crc32c(b"123456789") == 0xE3069283


def test_texts_follow_the_checksums_without_a_gap(root: Path) -> None:
    """format F54, F64, F68"""
    for row in decode_files((root / files_key(100, 1)).read_bytes(), "k"):
        data = (root / data_key(100, 1, row.rank)).read_bytes()
        assert row.ours.offset == row.checksums.end
        assert row.mine.offset == row.ours.end
        assert row.size == row.mine.end == len(data)
        for part in (row.checksums, row.ours, row.mine):
            assert hashlib.sha256(data[part.offset : part.end]).hexdigest() == part.sha256


def test_counts_are_those_of_the_plan(root: Path) -> None:
    """format F25"""
    counts, plan = read(root).record["counts"], SAMPLE.plan()
    assert counts["fragments"] == len(plan.fragments)
    assert counts["bytes"] == sum(whole.array.nbytes for whole in SAMPLE.tensors.values())
    assert counts["blocks"] == sum(blocks for _, blocks in plan.file_ends())


def test_the_newest_step_is_the_greatest_of_the_live_history(tmp_path: Path) -> None:
    """format F19, F21, F22"""
    storage = LocalStorage(tmp_path)

    def newest() -> tuple[int, int]:
        record = read(tmp_path).record
        found = read_history(storage).newest
        assert found is not None
        assert (found.step, found.term) == (record["step"], record["term"])
        return found.step, found.term

    put_term(tmp_path, 1)
    for step in (100, 200, 300):
        Step(step, 1, {}).write(tmp_path)
    assert newest() == (300, 1)
    put_term(tmp_path, 2, parent=(1, 100))
    assert newest() == (100, 1)
    Step(400, 1, {}).write(tmp_path)
    assert newest() == (100, 1)
    Step(150, 2, {}).write(tmp_path, "t2")
    assert newest() == (150, 2)
    put_term(tmp_path, 3)
    assert newest() == (150, 2)
    Step(10, 3, {}).write(tmp_path, "t3")
    assert newest() == (10, 3)


def test_a_record_of_another_claim_is_refused(tmp_path: Path) -> None:
    """format F20, F22"""
    put_term(tmp_path, 1)
    Step(100, 1, {}).write(tmp_path, "another's id")
    with pytest.raises(ValueError, match="term of record"):
        read(tmp_path)


def test_a_tombstone_is_no_step(tmp_path: Path) -> None:
    """format F27, F28"""
    put_term(tmp_path, 1)
    Step(100, 1, {}).write(tmp_path)
    put(tmp_path, record_key(200, 1), Tombstone(200, 1, "gc", 1.0).encode())
    assert read(tmp_path).record["step"] == 100


def test_a_deleted_step_is_no_step_whatever_is_left_of_it(tmp_path: Path) -> None:
    """format F107, F108"""
    put_term(tmp_path, 1)
    for step in (100, 200, 300):
        Step(step, 1, {}).write(tmp_path)
    put_term(tmp_path, 2, parent=(1, 300))
    put(tmp_path, deletion_key(300, 1), Deletion(300, 1, "r300", "rm", 1.0).encode())
    assert read(tmp_path).record["step"] == 200
    assert read_history(LocalStorage(tmp_path)).newest == StepRef(200, 1)
    (tmp_path / record_key(300, 1)).unlink()
    assert read(tmp_path).record["step"] == 200


def test_a_root_without_a_record_has_no_step(tmp_path: Path) -> None:
    """format F21"""
    put_term(tmp_path, 1)
    Step(100, 1, {}).write(tmp_path)
    (tmp_path / record_key(100, 1)).unlink()
    with pytest.raises(FileNotFoundError):
        read(tmp_path)
