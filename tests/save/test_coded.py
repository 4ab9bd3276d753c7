"""The coded data file out of chunks: all blocks in order, bounded memory, and nothing after an error."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dscheck.codec.decode import Decoder
from dscheck.config import Settings
from dscheck.errors import DscheckError, TornSnapshotError
from dscheck.manifest.blocks import BlockTable, Codec
from dscheck.save import coded
from dscheck.save.coded import write_coded
from dscheck.save.parts import Free
from dscheck.save.trace import Trace
from dscheck.save.write import DataFile
from dscheck.snapshot import Chunk
from tests.end_to_end.worlds import fresh
from tests.save.test_write import BLOCK, OBJECTS, chunk_of, reused

KEY = "steps/1/1/data-0.bin"
HALVES = np.random.default_rng(4).standard_normal(1 << 21).astype("<f4").view(np.uint8)
"""8 MiB of floats."""


def decoded(stored: bytes, table: BlockTable, sizes: list[int]) -> list[bytes]:
    """Each fragment, out of the blocks of a file."""
    assert table.stored is not None
    decoder, number, found = Decoder(), 0, []
    for size in sizes:
        out = np.empty(size, np.uint8)
        for at in range(0, size, BLOCK):
            begin, end = table.stored.starts[number : number + 2].tolist()
            codec = Codec(int(table.stored.codecs[number]))
            decoder.decode(memoryview(stored)[begin:end], codec, out[at : at + BLOCK])
            number += 1
        found.append(out.tobytes())
    assert number == len(table.checksums)
    return found


@given(
    fragments=st.lists(
        st.tuples(
            st.sampled_from([4, 8, 512, BLOCK - 4, BLOCK, 3 * BLOCK + 8, 300 * BLOCK, 300 * BLOCK + 12]),
            st.sampled_from([Codec.RAW, Codec.ZSTD, Codec.SHUFFLE_4]),
        ),
        min_size=1,
        max_size=6,
    ),
    blocks=st.sampled_from([1, 3, 64, 300]),
)
def test_fragments_of_mixed_codecs_come_back_in_order(fragments: list[tuple[int, Codec]], blocks: int) -> None:
    storage, sizes = fresh(), [size for size, _ in fragments]
    given = [HALVES[8 * i : 8 * i + size] for i, size in enumerate(sizes)]
    settings = Settings(block_bytes=BLOCK, io_threads=2)
    file = DataFile(storage, KEY, settings, Trace(None, 1, 0), lambda: None)
    row = file.write(0, sizes, (reused(data, blocks * BLOCK) for data in given), OBJECTS, [c for _, c in fragments])
    stored, place = storage.read(KEY), row.checksums
    assert row.coded
    table = BlockTable.decode(stored[place.offset : place.end], row.blocks, place.offset, BLOCK)
    assert decoded(stored, table, sizes) == [data.tobytes() for data in given]
    assert table.checksums.tolist() == [crc for data in given for crc in chunk_of(data).checksums.tolist()]


def test_a_fragment_that_is_short_leaves_no_file() -> None:
    storage = fresh()
    file = DataFile(storage, KEY, Settings(block_bytes=BLOCK), Trace(None, 1, 0), lambda: None)
    with pytest.raises(DscheckError, match="came as"):
        file.write(0, [3 * BLOCK], [[chunk_of(HALVES[: 2 * BLOCK])]], OBJECTS, [Codec.ZSTD])
    assert not [*storage.list("")]


def test_a_torn_snapshot_found_by_the_last_chunk_leaves_no_file() -> None:
    def torn() -> Iterator[Chunk]:
        yield chunk_of(HALVES[: 8 * BLOCK])
        raise TornSnapshotError("changed", tensor="w")

    storage = fresh()
    file = DataFile(storage, KEY, Settings(block_bytes=BLOCK), Trace(None, 1, 0), lambda: None)
    with pytest.raises(TornSnapshotError):
        file.write(0, [9 * BLOCK], [torn()], OBJECTS, [Codec.SHUFFLE_4])
    assert not [*storage.list("")]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("dscheck-encode")]


def test_a_save_is_given_up_between_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coded, "BATCH_BYTES", 64 * BLOCK)
    written: list[int] = []

    def write(data: bytes | memoryview, free: Free | None) -> None:
        written.append(len(data))
        raise DscheckError("too late")

    with pytest.raises(DscheckError, match="too late"):
        write_coded(write, [[chunk_of(HALVES)]], [Codec.SHUFFLE_4], BLOCK, 1)
    assert len(written) == 1


def test_nothing_reads_a_chunk_once_the_next_one_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """`reused` zeroes it then: the encoder, which is slow here, must have been through with it."""
    encode = coded.Encoder.encode
    late = threading.Event()

    def slowly(self: coded.Encoder, data: memoryview, codec: Codec) -> coded.Encoded:
        late.wait(0.01)
        return encode(self, data, codec)

    monkeypatch.setattr(coded.Encoder, "encode", slowly)
    parts: list[bytes] = []
    data = HALVES[: 40 * BLOCK]
    table = write_coded(lambda part, free: parts.append(bytes(part)), [reused(data, 8 * BLOCK)], [Codec.ZSTD], BLOCK, 2)
    assert decoded(b"".join(parts), table, [len(data)]) == [data.tobytes()]


def test_memory_is_that_of_a_few_batches_whatever_a_fragment_has(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = 1 << 20
    monkeypatch.setattr(coded, "BATCH_BYTES", batch)

    def chunks(data: NDArray[np.uint8]) -> Iterable[Chunk]:
        for _ in range(4):
            yield chunk_of(data)

    tracemalloc.start()
    try:
        write_coded(lambda part, free: None, [chunks(HALVES)], [Codec.SHUFFLE_4], BLOCK, 2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5 * batch
