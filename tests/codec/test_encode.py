"""What the encoder stores, the decoder gives back: any codec, any block length, any content."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dscheck.codec.choice import codec_of
from dscheck.codec.decode import Decoder
from dscheck.codec.encode import Encoder
from dscheck.manifest.blocks import BlockTable, Codec, StoredBlocks
from dscheck.manifest.dtypes import ITEMSIZE
from dscheck.native import crc32c

RANDOM = np.random.default_rng(5)
CONTENTS = {
    "zeros": np.zeros(1 << 17, np.uint8),
    "noise": RANDOM.integers(0, 256, 1 << 17, dtype=np.uint8),
    "floats": (RANDOM.standard_normal(1 << 15) * 0.02).astype("<f4").view(np.uint8),
    "text": np.frombuffer(b"the same again, " * 8192, np.uint8),
}


@given(
    codec=st.sampled_from([codec for codec in Codec if codec is not Codec.RAW]),
    content=st.sampled_from(sorted(CONTENTS)),
    elements=st.integers(1, 16000),
    block_bytes=st.sampled_from([4096, 16384, 65536]),
    threads=st.sampled_from([1, 3]),
)
def test_blocks_come_back_whatever_they_hold(
    codec: Codec, content: str, elements: int, block_bytes: int, threads: int
) -> None:
    data = CONTENTS[content][: elements * codec.width]
    encoded = Encoder(block_bytes, threads).encode(data.data, codec)
    decoder, out, at = Decoder(), np.empty_like(data), 0
    for number, (size, found) in enumerate(zip(encoded.sizes.tolist(), encoded.codecs.tolist(), strict=True)):
        block = out[number * block_bytes : (number + 1) * block_bytes]
        stored = memoryview(encoded.data)[at : at + size]
        assert crc32c(stored) == encoded.checksums[number]
        assert size < len(block) if found else size == len(block)
        assert found in (codec, Codec.RAW)
        decoder.decode(stored, Codec(found), block)
        at += size
    assert at == len(encoded.data)
    assert out.tobytes() == data.tobytes()


def test_noise_is_stored_raw_and_planes_beat_zstd_alone_on_floats() -> None:
    encoder = Encoder(65536, 1)
    assert not encoder.encode(CONTENTS["noise"].data, Codec.SHUFFLE_2).codecs.any()
    floats = CONTENTS["floats"].data
    assert encoder.encode(floats, Codec.SHUFFLE_4).sizes.sum() < 0.93 * encoder.encode(floats, Codec.ZSTD).sizes.sum()


def test_one_encoder_serves_batches_of_all_lengths() -> None:
    """Its planes are kept, and are longer than the next batch needs."""
    encoder, data = Encoder(4096, 2), CONTENTS["floats"]
    for length in (8192, 4096 + 64, 65536, 512):
        once = Encoder(4096, 1).encode(data[:length].data, Codec.SHUFFLE_4)
        assert bytes(encoder.encode(data[:length].data, Codec.SHUFFLE_4).data) == bytes(once.data)


@pytest.mark.parametrize("dtype", sorted(ITEMSIZE))
def test_every_dtype_has_a_codec_whose_elements_fill_its_own(dtype: str) -> None:
    for name in ("none", "zstd", "shuffle-zstd"):
        assert ITEMSIZE[dtype] % codec_of(name, dtype).width == 0
    assert codec_of("shuffle-zstd", dtype).width == {16: 8}.get(ITEMSIZE[dtype], ITEMSIZE[dtype]) // (
        2 if dtype in ("complex32", "complex64") else 1
    )


def test_a_table_reads_back_as_it_was_written() -> None:
    """format F111, F112, F113"""
    crcs, sizes, codecs = np.array([1, 2], np.uint32), np.array([100, 7], np.uint32), np.array([3, 0], np.uint8)
    written = BlockTable(np.array([8, 9], np.uint32), StoredBlocks.of(crcs, sizes, codecs)).encode()
    expected = np.array([8, 9, 1, 2, 100, 7], "<u4").tobytes() + b"\3\0"
    assert written == expected
    found = BlockTable.decode(written, 2, 112, 4096)
    assert found.stored is not None
    assert found.checksums.tolist() == [8, 9]
    assert found.stored.starts.tolist() == [0, 100, 107]
    assert BlockTable.decode(written[:8], 2, 0, 4096).stored is None
