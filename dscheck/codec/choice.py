"""Which codec the blocks of a tensor have, by the setting and its dtype."""

from __future__ import annotations

from dscheck.config import CodecName
from dscheck.manifest.blocks import Codec
from dscheck.manifest.dtypes import ITEMSIZE

_SHUFFLES = {2: Codec.SHUFFLE_2, 4: Codec.SHUFFLE_4, 8: Codec.SHUFFLE_8}


def codec_of(name: CodecName, dtype: str) -> Codec:
    """The codec of a setting other than "auto" for elements of `dtype`; those of one byte have no planes.

    >>> codec_of("shuffle-zstd", "bfloat16"), codec_of("shuffle-zstd", "complex64"), codec_of("shuffle-zstd", "bool")
    (<Codec.SHUFFLE_2: 2>, <Codec.SHUFFLE_4: 3>, <Codec.ZSTD: 1>)
    """
    if name == "none":
        return Codec.RAW
    if name == "zstd":
        return Codec.ZSTD
    parts = 2 if dtype.startswith("complex") else 1  # real and imaginary
    return _SHUFFLES.get(ITEMSIZE[dtype] // parts, Codec.ZSTD)
