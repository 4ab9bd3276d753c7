from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

class _HostTensor(Protocol):
    """What DLPack offers beside the buffer protocol, e.g. a torch tensor."""

    def __dlpack__(self, *args: object, **kwargs: object) -> object: ...
    def __dlpack_device__(self) -> tuple[object, int]: ...

def crc32c(data: Buffer | _HostTensor, value: int = 0) -> int:
    """The CRC32C (RFC 3720) of `data`, continued from `value`, the CRC of the bytes before it.

    `data`: contiguous 1-D uint8 in host memory, read in place. Raises TypeError for other objects and element types,
    ValueError for other shapes, strides and devices, and for a `value` outside [0, 2**32).
    """

def crc32c_scalar(data: Buffer | _HostTensor, value: int = 0) -> int:
    """crc32c() on the portable path, whatever the CPU can do."""

def crc32c_blocks(data: Buffer | _HostTensor, block_bytes: int, threads: int = 1) -> NDArray[np.uint32]:
    """The CRC32C of each `block_bytes` of `data`, the last block being what is left; empty for no data.

    Up to `threads` native threads share the work. Raises as crc32c() does, and ValueError for a `block_bytes` or
    `threads` below 1.
    """

def crc32c_is_accelerated() -> bool:
    """Whether crc32c() runs on CRC instructions on this CPU."""
