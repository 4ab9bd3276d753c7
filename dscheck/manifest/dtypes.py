"""The element types that a checkpoint may hold, by torch's names, and their sizes. Source: docs/format.md."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

ITEMSIZE: Mapping[str, int] = MappingProxyType(
    {
        "float64": 8,
        "float32": 4,
        "float16": 2,
        "bfloat16": 2,
        "float8_e4m3fn": 1,
        "float8_e4m3fnuz": 1,
        "float8_e5m2": 1,
        "float8_e5m2fnuz": 1,
        "float8_e8m0fnu": 1,
        "float4_e2m1fn_x2": 1,  # two numbers in a byte; shapes count bytes, as torch does
        "int8": 1,
        "int16": 2,
        "int32": 4,
        "int64": 8,
        "uint8": 1,
        "uint16": 2,
        "uint32": 4,
        "uint64": 8,
        "bool": 1,
        "complex32": 4,
        "complex64": 8,
        "complex128": 16,
    }
)
"""Bytes of one element."""
