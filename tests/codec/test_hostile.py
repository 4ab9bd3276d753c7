"""Coded blocks from strangers, with checksums and digests that are right: each is refused, by name, and cheaply."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard

from dscheck import Checkpointer
from dscheck.cli.step import open_step
from dscheck.codec.decode import Decoder
from dscheck.commit.verify import verify
from dscheck.errors import CorruptCheckpointError, LayoutError, UnsupportedFormatError
from dscheck.manifest.blocks import Codec
from dscheck.manifest.record import Record, decode_record
from tests.codec.forge import BLOCK_BYTES, Forged, Stored
from tests.manifest import plain_reader

HUGE = 1 << 30


def frame(data: bytes, **options: bool) -> bytes:
    return zstandard.ZstdCompressor(level=1, **options).compress(data)


def renamed_size(data: bytes, size: int) -> bytes:
    """A frame whose header says `size` instead: four bytes behind the magic and the descriptor, as for 64 KiB up."""
    made = bytearray(frame(bytes(HUGE >> 12)))
    assert zstandard.frame_content_size(bytes(made)) == HUGE >> 12
    made[5:9] = size.to_bytes(4, "little")
    assert zstandard.frame_content_size(bytes(made)) == size
    return bytes(made)


def window_of(data: bytes) -> bytes:
    """A frame of `data` whose window is far longer."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=27)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    begun = bytearray(compressor.compress(data) + compressor.flush())
    assert zstandard.get_frame_parameters(bytes(begun)).window_size > len(data)
    return bytes(begun)


def planes(*parts: bytes, sizes: list[int] | None = None) -> bytes:
    return np.array(sizes or [len(part) for part in parts], "<u4").tobytes() + b"".join(parts)


RAW = bytes(BLOCK_BYTES)
HALF = bytes(BLOCK_BYTES // 2)
BAD = {
    "it claims a huge size": (Codec.ZSTD, renamed_size(RAW, HUGE)),
    "it says less": (Codec.ZSTD, frame(RAW[:-1])),
    "it says more": (Codec.ZSTD, frame(RAW + b"\0")),
    "it does not say": (Codec.ZSTD, frame(RAW, write_content_size=False)),
    "its window is larger": (Codec.ZSTD, window_of(RAW)),
    "it becomes more than it says": (Codec.ZSTD, renamed_size(RAW, BLOCK_BYTES)),
    "it is cut off": (Codec.ZSTD, frame(RAW)[:-1]),
    "something lies behind it": (Codec.ZSTD, frame(RAW) + b"\0"),
    "another frame lies behind it": (Codec.ZSTD, frame(RAW) + frame(b"")),
    "it is garbage": (Codec.ZSTD, b"garbage" * 100),
    "it is a skippable frame": (Codec.ZSTD, b"\x50\x2a\x4d\x18" + (8).to_bytes(4, "little") + bytes(8)),
    "it is stored raw and short": (Codec.RAW, RAW[:-1]),
    "it is no shorter than raw": (Codec.ZSTD, frame(np.random.default_rng(1).bytes(BLOCK_BYTES))),
    "its planes have no sizes": (Codec.SHUFFLE_4, b"1234567"),
    "it has a plane too few": (Codec.SHUFFLE_2, planes(frame(HALF))),
    "its planes end behind it": (Codec.SHUFFLE_2, planes(frame(HALF), frame(HALF), sizes=[4, 1 << 31])),
    "its planes end before it": (
        Codec.SHUFFLE_2,
        planes(frame(HALF), frame(HALF), b"more", sizes=[len(frame(HALF))] * 2),
    ),
    "a plane becomes more": (Codec.SHUFFLE_2, planes(frame(HALF), frame(HALF + b"\0"))),
    "a plane is garbage": (Codec.SHUFFLE_2, planes(frame(HALF), b"garbage")),
}


@pytest.mark.parametrize("why", BAD)
def test_a_block_that_is_not_what_it_must_be_is_refused_before_it_takes_memory(why: str) -> None:
    """format F114, F115, F116, F117; TRAPS 36"""
    codec, data = BAD[why]
    decoder, out = Decoder(), np.empty(BLOCK_BYTES, np.uint8)
    tracemalloc.start()
    try:
        with pytest.raises(LayoutError):
            decoder.decode(memoryview(data), codec, out)
        assert tracemalloc.get_traced_memory()[1] < 4 * BLOCK_BYTES
    finally:
        tracemalloc.stop()


def test_a_block_that_is_no_whole_number_of_elements_has_no_planes() -> None:
    """format F115"""
    with pytest.raises(LayoutError, match="elements of 4"):
        Decoder().decode(memoryview(bytes(16)), Codec.SHUFFLE_4, np.empty(1002, np.uint8))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A coded step of zeros, whose blocks all are 4 KiB of floats by their planes, and of bytes, by zstd alone."""
    with Checkpointer(str(tmp_path), state(), rng=False, codec="shuffle-zstd", block_bytes=BLOCK_BYTES) as ckpt:
        ckpt.save(1).wait(60)
    return tmp_path


def state() -> dict[str, torch.Tensor]:
    noise = torch.randint(0, 256, (BLOCK_BYTES,), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    return {"bytes": torch.zeros(3 * BLOCK_BYTES, dtype=torch.uint8), "floats": torch.zeros(10_000), "noise": noise}


def refused_everywhere(root: Path, load: str, plain: str | None = None) -> None:
    """By a load, and by the reader that knows only the format; nothing reaches a tensor."""
    live = {name: torch.ones_like(value) for name, value in state().items()}
    with Checkpointer(str(root), live, rng=False) as ckpt, pytest.raises(CorruptCheckpointError, match=load):
        ckpt.load()
    assert all(bool((tensor == 1).all()) for tensor in live.values())
    with pytest.raises(Exception, match=plain):
        plain_reader.read(root)


def damages(root: Path) -> list[tuple[int | None, str]]:
    return [(found.offset, found.what) for found in verify(open_step(str(root), 1), lambda nbytes: None)]


@pytest.mark.parametrize("why", BAD)
def test_a_load_and_verify_refuse_it_by_the_name_of_its_tensor(root: Path, why: str) -> None:
    """format F116, F117"""
    codec, data = BAD[why]
    forged = Forged(root)
    forged.blocks[1] = Stored(data, codec)
    forged.write()
    live = {name: torch.ones_like(value) for name, value in state().items()}
    with Checkpointer(str(root), live, rng=False) as ckpt, pytest.raises(CorruptCheckpointError) as caught:
        ckpt.load()
    where = len(forged.blocks[0].data)
    if len(data) < BLOCK_BYTES:
        assert "'bytes'" in str(caught.value)
        assert f"at {where};" in str(caught.value)
        assert [offset for offset, _ in damages(root)] == [where]
    with pytest.raises((ValueError, zstandard.ZstdError)):
        plain_reader.read(root)


def test_a_stored_block_with_a_flipped_bit_is_named_where_it_lies(root: Path) -> None:
    """format F117"""
    forged = Forged(root)
    where, block = sum(len(block.data) for block in forged.blocks[:2]), forged.blocks[2]
    path = root / "steps/1/1/data-0.bin"
    for bit in (0, 8 * len(block.data) - 1):
        data = bytearray(path.read_bytes())
        data[where + bit // 8] ^= 1 << bit % 8
        whole = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
        refused_everywhere(root, rf"'bytes'.* stored, .* read from .*data-0.bin' at {where};", "stored block 2")
        ((offset, what),) = damages(root)
        assert (offset, "crc32c" in what) == (where, True)
        path.unlink()
        path.write_bytes(whole)


def test_a_block_that_decodes_to_other_bytes_than_were_saved_is_refused(root: Path) -> None:
    """format F117: the writer's memory, or its codec, was wrong."""
    forged = Forged(root)
    forged.blocks[1] = Stored(frame(b"\1" + RAW[1:]), Codec.ZSTD)
    forged.write()
    refused_everywhere(root, "'bytes'.* stored, .* decoded from .* at ", "block 1 of ")
    assert [what.rpartition(" ")[2] for _, what in damages(root)] == ["decoded"]


Change = Callable[[Forged], None]


def overlapping(forged: Forged) -> None:
    """The second block is said to begin 8 bytes before the first one's end, and so on to the checksums."""
    forged.blocks[0].size = len(forged.blocks[0].data) - 8


def beyond(forged: Forged) -> None:
    forged.blocks[0].size = BLOCK_BYTES


def without(forged: Forged) -> None:
    forged.blocks[0].size = 0


def over_a_block(forged: Forged) -> None:
    forged.blocks[0].size = 1 << 31


def of_no_codec(forged: Forged) -> None:
    forged.blocks[0].codec = 5


TABLES: dict[str, tuple[Change, str]] = {
    "blocks overlap": (overlapping, "checksums at"),
    "blocks leave the file": (beyond, "checksums at"),
    "a block has no bytes": (without, "1 to 16384 expected"),
    "a block is longer than any": (over_a_block, "1 to 16384 expected"),
    "a codec is unknown": (of_no_codec, "unknown codec 5"),
}


@pytest.mark.parametrize("why", TABLES)
def test_a_table_that_cannot_be_is_refused(root: Path, why: str) -> None:
    """format F112, F113, F114, F116"""
    change, message = TABLES[why]
    forged = Forged(root)
    change(forged)
    forged.write()
    refused_everywhere(root, message)
    assert any(message in what for _, what in damages(root))


def test_sizes_that_swap_bytes_between_blocks_are_refused(root: Path) -> None:
    """format F112: the sum is right, and each block is another."""
    forged = Forged(root)
    first, second = forged.blocks[:2]
    first.size, second.size = len(first.data) - 1, len(second.data) + 1
    forged.write()
    refused_everywhere(root, "'bytes'.* stored, .* read from", "stored block 0")
    assert [what.rpartition(" ")[2] for _, what in damages(root)] == ["read", "read"]


def test_a_short_block_that_claims_to_be_a_long_one_does_not_overflow_its_buffer(root: Path) -> None:
    """TRAPS 36"""
    forged = Forged(root)
    short = 3 + 10_000 * 4 // BLOCK_BYTES  # the last block of the floats, behind three of bytes
    forged.blocks[short] = Stored(RAW, Codec.RAW)
    forged.write()
    refused_everywhere(root, r"'floats'.* stored")
    assert len(damages(root)) == 1


def test_a_coded_file_is_read_only_under_a_record_that_requires_it(root: Path) -> None:
    """format F111"""
    Forged(root).write(requires=())
    refused_everywhere(root, "with a codec, and a record that requires nothing", "requires")


def test_a_reader_of_other_requirements_refuses_the_record(root: Path) -> None:
    """format F15"""
    Forged(root).write(requires=("codec", "planes"))
    with pytest.raises(UnsupportedFormatError, match="use a newer one"):
        Checkpointer(str(root), state(), rng=False)


def test_a_record_must_not_require_a_codec_that_no_file_has(tmp_path: Path) -> None:
    """format F111"""
    with Checkpointer(str(tmp_path), state(), rng=False, block_bytes=BLOCK_BYTES) as ckpt:
        ckpt.save(1).wait(60)
    key = "records/1-1.json"
    record = decode_record((tmp_path / key).read_bytes(), key)
    assert isinstance(record, Record)
    (tmp_path / key).unlink()
    (tmp_path / key).write_bytes(replace(record, requires=("codec",)).encode())
    refused_everywhere(tmp_path, "without a codec", "requires")
