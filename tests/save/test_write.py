"""The data file out of chunks: the same bytes and checksums as out of whole fragments, and nothing after an error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dscheck.config import Settings
from dscheck.errors import DscheckError, TornSnapshotError
from dscheck.manifest.place import place
from dscheck.native import crc32c_blocks
from dscheck.save.trace import Trace
from dscheck.save.write import WRITE_BYTES, DataFile, Objects
from dscheck.snapshot import Chunk
from dscheck.storage.base import Storage
from tests.end_to_end.worlds import fresh

BLOCK = 4096
NOISE = np.random.default_rng(3).integers(0, 256, 3 * WRITE_BYTES, dtype=np.uint8)
OBJECTS = Objects(b"ours", b"mine of this rank")


def data_file(storage: Storage) -> DataFile:
    settings = Settings(block_bytes=BLOCK)
    return DataFile(storage, "steps/1/1/data-0.bin", settings, Trace(None, 1, 0), lambda: None)


def chunk_of(data: NDArray[np.uint8]) -> Chunk:
    return Chunk.of(data, BLOCK)


def reused(data: NDArray[np.uint8], chunk_bytes: int) -> Iterator[Chunk]:
    """Chunks in one memory, as the ring of a small budget gives them."""
    memory = np.empty(chunk_bytes, np.uint8)
    for start in range(0, len(data), chunk_bytes):
        chunk = data[start : start + chunk_bytes]
        memory[: len(chunk)] = chunk
        yield chunk_of(memory[: len(chunk)])
        memory[:] = 0


@given(
    sizes=st.lists(st.sampled_from([1, 8, BLOCK - 1, BLOCK, 3 * BLOCK + 5, 1 << 20, (1 << 20) + 13]), max_size=6),
    blocks=st.sampled_from([1, 3, 64, 300]),
)
def test_chunks_give_the_file_that_whole_fragments_would(sizes: list[int], blocks: int) -> None:
    storage, fragments = fresh(), [NOISE[7 * i : 7 * i + size] for i, size in enumerate(sizes)]
    row = data_file(storage).write(0, sizes, (reused(data, blocks * BLOCK) for data in fragments), OBJECTS)
    stored = storage.read("steps/1/1/data-0.bin")
    offsets, _, _ = place(sizes, BLOCK)
    for offset, data in zip(offsets, fragments, strict=True):
        assert stored[offset : offset + len(data)] == data.tobytes()
    crcs = np.frombuffer(stored, "<u4", row.blocks, row.checksums.offset)
    assert crcs.tolist() == [crc for data in fragments for crc in crc32c_blocks(data, BLOCK).tolist()]
    assert len(stored) == row.size
    assert stored[row.ours.offset :] == OBJECTS.ours + OBJECTS.mine


def test_a_large_chunk_is_written_in_parts_and_small_ones_together() -> None:
    storage = fresh()
    sizes = [len(NOISE), 5, 5]
    row = data_file(storage).write(
        0, sizes, ([chunk_of(NOISE)], [chunk_of(NOISE[:5])], [chunk_of(NOISE[5:10])]), OBJECTS
    )
    assert storage.read("steps/1/1/data-0.bin")[: len(NOISE)] == NOISE.tobytes()
    assert row.blocks == len(NOISE) // BLOCK + 2


@pytest.mark.parametrize(
    "chunks",
    [[NOISE[:BLOCK]], [NOISE[: 3 * BLOCK]], [NOISE[:100], NOISE[100 : 2 * BLOCK]], []],
    ids=["too few bytes", "too many bytes", "a chunk that ends within a block", "none"],
)
def test_chunks_that_are_not_the_fragment_are_refused(chunks: list[NDArray[np.uint8]]) -> None:
    storage = fresh()
    with pytest.raises(DscheckError, match=r"data-0\.bin: a fragment of 8192 bytes"):
        data_file(storage).write(0, [2 * BLOCK], [map(chunk_of, chunks)], OBJECTS)
    assert list(storage.list("")) == []


def test_an_error_of_the_capture_leaves_no_file() -> None:
    """Also one that comes behind the last chunk: what was written counts only with the proof."""

    def torn() -> Iterator[Iterable[Chunk]]:
        yield [chunk_of(NOISE[:BLOCK])]
        raise TornSnapshotError("injected", tensor="w")

    storage = fresh()
    with pytest.raises(TornSnapshotError):
        data_file(storage).write(0, [BLOCK], torn(), OBJECTS)
    assert list(storage.list("")) == []
