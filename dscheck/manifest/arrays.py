"""Small arrays inside plain objects: bytes in base64 with a dtype and a shape, whatever library they belong to."""

from __future__ import annotations

import base64
import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from dscheck.manifest.dtypes import ITEMSIZE

MAX_NDIM = 64
NUMPY_DTYPES = frozenset(ITEMSIZE) & frozenset(np.dtype(code).name for code in "?bhilqBHILQefdFD")


@dataclass(frozen=True, slots=True)
class Array:
    """An array without its library: little-endian, row-major bytes; `dtype` is a name of dtypes.py.

    `lib` is "torch" for a torch tensor, "numpy" for an array, "numpy.scalar" for one of NumPy's scalars.
    """

    lib: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def from_numpy(value: Any) -> Array | None:
    """NumPy's own arrays and scalars; None for everything else, subclasses and other element types included."""
    scalar = isinstance(value, np.generic)
    if not (scalar or type(value) is np.ndarray) or value.dtype.name not in NUMPY_DTYPES:
        return None
    if scalar and type(value) is not value.dtype.type:
        return None
    little = np.asarray(value, value.dtype.newbyteorder("<"))
    return Array("numpy.scalar" if scalar else "numpy", value.dtype.name, little.shape, little.tobytes())


def to_numpy(array: Array) -> Any:
    """A new, writable array, or a scalar, as `array.lib` says. ValueError for what `from_numpy` does not make."""
    if array.dtype not in NUMPY_DTYPES:
        raise ValueError(f"NumPy has no dtype {array.dtype!r}")
    found = np.frombuffer(array.data, np.dtype(array.dtype).newbyteorder("<")).reshape(array.shape)
    if array.lib == "numpy":
        return found.astype(array.dtype, order="C")
    if array.shape:
        raise ValueError(f"a scalar of shape {array.shape}")
    return found.astype(array.dtype)[()]


def to_json(array: Array) -> dict[str, Any]:
    """The members of its tagged form, the tag left out."""
    return {"lib": array.lib, "dtype": array.dtype, "shape": list(array.shape), "data": to_text(array.data)}


def from_json(lib: Any, dtype: Any, shape: Any, data: Any) -> Array:
    """The array that `to_json` was given. Raises ValueError unless the bytes are exactly those of dtype and shape."""
    if lib not in ("numpy", "numpy.scalar", "torch"):
        raise ValueError(f"an array of the unknown library {lib!r}")
    if type(dtype) is not str or dtype not in ITEMSIZE:
        raise ValueError(f"an array of the unknown dtype {dtype!r}")
    if type(shape) is not list or len(shape) > MAX_NDIM or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError("an array with an impossible shape")
    # Zeros left out: libraries multiply in any order.
    if math.prod(n or 1 for n in shape) * ITEMSIZE[dtype] > sys.maxsize:
        raise ValueError(f"an array of the impossible shape {shape}")
    content, expected = from_text(data), math.prod(shape) * ITEMSIZE[dtype]
    if len(content) != expected:
        raise ValueError(f"an array of {len(content)} bytes, shape {shape} of {dtype} needs {expected}")
    if dtype == "bool" and content.strip(b"\0\1"):
        raise ValueError("a bool that is neither 0 nor 1")
    return Array(lib, dtype, tuple(shape), content)


def to_text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def from_text(text: Any) -> bytes:
    if type(text) is not str:
        raise ValueError(f"base64 text expected, {type(text).__name__} found")
    return base64.b64decode(text, validate=True)
