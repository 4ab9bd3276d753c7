from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
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

def crc32c_blocks(data: Buffer | _HostTensor, block_bytes: int) -> NDArray[np.uint32]:
    """The CRC32C of each `block_bytes` of `data`, the last block being what is left; empty for no data.

    Raises as crc32c() does, and ValueError for a `block_bytes` below 1.
    """

def crc32c_parts(data: Buffer | _HostTensor, sizes: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The CRC32C of each of the parts, `sizes` bytes long, that lie side by side in `data` and are all of it.

    Raises as crc32c() does, and ValueError for parts that are not.
    """

def shuffle_blocks(data: Buffer | _HostTensor, width: int, block_bytes: int, out: NDArray[np.uint8]) -> None:
    """Each block of `data` as its byte planes in `out`: byte i of element j of n at i * n + j of the block.

    Elements have `width` bytes: 1, 2, 4 or 8. Raises as crc32c() does, and ValueError for blocks that are not whole
    elements, and for an `out` of another length or in the same memory.
    """

def unshuffle(data: Buffer | _HostTensor, width: int, out: NDArray[np.uint8]) -> None:
    """The elements in `out` whose byte planes are `data`, one block. Raises as `shuffle_blocks` does."""

def crc32c_is_accelerated() -> bool:
    """Whether crc32c() runs on CRC instructions on this CPU."""

class Node:
    """What one value of an object graph is expected to be."""

class Anything(Node):
    """Any value."""

    def __init__(self) -> None: ...

class At(Node):
    """The object at this address. Only for one that something else shows to be alive (a Standing, a Memory)."""

    def __init__(self, object: Any) -> None: ...

class Same(Node):
    """The very object, which is not kept alive. Raises TypeError for one that cannot be referred to weakly."""

    def __init__(self, object: Any) -> None: ...

class Kind(Node):
    """Any object of exactly this type. `wanted_as`: a look gives it back under this name."""

    def __init__(self, type: type, wanted_as: str | None = None) -> None: ...

class Equal(Node):
    """An equal value. This one is kept, so it must hold no tensor."""

    def __init__(self, value: Any) -> None: ...

class Entries(Node):
    """A container of the same type with as many entries, in this order, under equal keys, and `nodes` for the values.

    Keys that are neither texts nor ints are compared by identity. Raises ValueError for too few nodes.
    """

    def __init__(self, container: Any, nodes: Sequence[Node]) -> None: ...

class Members(Node):
    """A dict that has these entries, among others."""

    def __init__(self, nodes: Mapping[str, Node]) -> None: ...

class Standing:
    """An object that is still alive, with the same type, with these attributes, and without those of `absent`.

    The latter are looked for in the object's own `__dict__` only. Nothing is kept alive.
    """

    def __init__(self, object: Any, attributes: Mapping[str, Node], absent: Sequence[str] = ()) -> None: ...

def look(roots: Sequence[Standing]) -> dict[str, Any] | None:
    """The wanted values by name if all of `roots` are as recorded, else None."""

class Memory:
    """Where and how tensors lie in memory; they are not kept alive. Raises TypeError or RuntimeError for tensors that
    have no memory of their own.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None: ...
    def tensors(self) -> list[torch.Tensor] | None:
        """The tensors; None if one is gone, or has another address, shape, dtype, device or strides."""

    def is_like(self, other: Memory) -> bool:
        """Whether both are as many tensors of equal shapes, dtypes, devices and strides, in this order."""

DROPPED: int
"""As the place of a piece: it is not in the file."""
KEPT: int
"""It is not written by native threads: await_run() hands it on."""
HOST: int
FROZEN: int
VOLATILE: int
PRIVATE: int
USABLE_WINDOW: float
"""The part of the measured window before a fence that is counted on."""

class CaptureShape:
    """What a plan fixes of a capture: bytes and device (HOST or an index) of each piece, small tensor and watched
    region; `small_targets`: byte offsets in the slab, multiples of 16. `block_bytes`: what one checksum is of. `check`:
    hash everything as well.
    """

    region_bytes: int
    """Where the last piece ends when an empty region takes all of them."""

    def __init__(
        self,
        piece_bytes: NDArray[np.uint64],
        piece_devices: NDArray[np.int32],
        small_bytes: NDArray[np.uint64],
        small_devices: NDArray[np.int32],
        small_targets: NDArray[np.uint64],
        watched_bytes: NDArray[np.uint64],
        watched_devices: NDArray[np.int32],
        block_bytes: int,
        check: bool,
    ) -> None: ...

class NativeCapture:
    """One capture of a Copier."""

    captured_s: float
    """When all was on the host and compared, in seconds of time.monotonic(); 0: not yet."""
    stalled_s: float
    """Seconds that fences held up the training streams; known once it is released."""
    placed: int
    """How many pieces have a place in the region."""

class Copier:
    """Copies pieces of live memory into one page-locked region in native threads: csrc/core/copier.h says all.

    Deadlines are seconds of time.monotonic(). `device_budget`: bytes of spill memory a device, None: what is free, less
    a reserve. Raises RuntimeError with the driver's words, MemoryError, and ValueError for arrays of a wrong length.
    """

    asked: int
    usable: int
    page_locked: bool
    prepared_s: float
    def __init__(self, host_threads: int, io_threads: int, device_budget: int | None) -> None: ...
    def prepare(self, host_bytes: int, devices: list[int], spill_bytes: int) -> None: ...
    def take(
        self,
        shape: CaptureShape,
        pieces: NDArray[np.uint64],
        owners: NDArray[np.int32],
        smalls: NDArray[np.uint64],
        watched: NDArray[np.uint64],
        streams: list[tuple[int, int]],
        window_hint_s: float,
    ) -> NativeCapture: ...
    def fence(self, capture: NativeCapture, owner: int, streams: list[tuple[int, int]], deadline_s: float) -> bool: ...
    def fail(self, capture: NativeCapture, why: str) -> None: ...
    def wait(self, capture: NativeCapture, deadline_s: float) -> bool: ...
    def await_slab(self, capture: NativeCapture, deadline_s: float) -> bool: ...
    def await_run(self, capture: NativeCapture, first: int, stop: int, deadline_s: float) -> int: ...
    def free_run(self, capture: NativeCapture, first: int, count: int) -> None: ...
    def release(self, capture: NativeCapture, deadline_s: float) -> bool: ...
    def write(
        self,
        capture: NativeCapture,
        file: int,
        direct: bool,
        slice_bytes: int,
        room: int,
        pieces: NDArray[np.uint64],
        smalls: NDArray[np.uint64],
        piece_blocks: NDArray[np.uint64],
        small_blocks: NDArray[np.uint64],
    ) -> int:
        """Begin to write everything to `file`, a descriptor, at the byte offsets `pieces` and `smalls`, and free each
        piece. 0, or the errno of what refused the first `room` bytes of the file their place on the disk.
        """
    def await_written(self, capture: NativeCapture, deadline_s: float) -> tuple[bool, int]:
        """Whether all is written; if not, the errno of a write, or 0 when the capture failed or it is too late."""
    def run(self, capture: NativeCapture, first: int, count: int) -> NDArray[np.uint8]: ...
    def slab(self, capture: NativeCapture, offset: int, nbytes: int) -> NDArray[np.uint8]: ...
    def failure(self, capture: NativeCapture) -> str: ...
    def torn(self, capture: NativeCapture) -> int | None: ...
    def pending(self, capture: NativeCapture) -> int | None: ...
    def hurry(self) -> None: ...
    def has_room(self, nbytes: int, longest: int) -> bool: ...
    def rate_and_window(self, device: int) -> tuple[float, float]: ...
    def spill_bytes(self, device: int) -> int: ...

def watched_sample(capture: NativeCapture, index: int) -> bytes:
    """The 256 bytes of watched region `index`."""

def piece_sample(capture: NativeCapture, index: int) -> bytes:
    """The 256 bytes of piece `index` as of take()."""

def matches(capture: NativeCapture, index: int, data: NDArray[np.uint8]) -> bool:
    """Whether `data` has the hash that take() made of entry `index`: pieces first, then small tensors."""

def checksums(capture: NativeCapture, first: int, count: int) -> bytes:
    """The CRC32Cs (native uint32) of the blocks of `count` pieces that await_run() has seen."""

def collect(capture: NativeCapture, blocks: NDArray[np.uint32]) -> None:
    """Fill in the CRC32Cs of the blocks of the file that Copier.write() has written."""

def times(capture: NativeCapture) -> list[tuple[int, bool, int, float, float, float, float]]:
    """Of each piece: device, whether it was spilled, bytes, when its copy began and ended, and its write (0: not
    yet).
    """

def sample(data: NDArray[np.uint8]) -> bytes:
    """256 bytes of `data`: the first 64, 32 inner words of 4, the last 64; zeros behind what is shorter."""

def has_cuda_driver() -> bool:
    """Whether a CUDA driver and a device were found."""

Blocks = tuple[int, int, NDArray[np.uint32]]
"""Offset in the read, bytes, and the CRC32C of each block."""

Copy = tuple[int, int, int, list[tuple[int, int, int]]]
"""Offset of the first element in the read, address of the target, bytes of an element, and for each dimension its
length and the steps in the read and in the target, in bytes.
"""

class File:
    """An open file, by descriptors of its own: the caller may close `fd`. Raises RuntimeError in the system's words."""

    def __init__(self, fd: int) -> None: ...

class NativeReader:
    """Native threads that read files past the page cache, verify blocks, and copy boxes: csrc/core/reader.h says all.

    Deadlines are seconds of time.monotonic(). `device`: the CUDA device that the buffers are page-locked for, or -1.
    A read without a file is filled by the caller. Targets of copies must stay alive until `stop` has returned. Raises
    RuntimeError, MemoryError, and ValueError for blocks and copies outside of their read.
    """

    def __init__(self, threads: int, buffers: int, buffer_bytes: int, block_bytes: int, device: int) -> None: ...
    def add(
        self, file: File | None, start: int, nbytes: int, blocks: Sequence[Blocks], copies: Sequence[Copy], kept: bool
    ) -> int: ...
    def finished(self, deadline_s: float) -> int | None: ...
    def fault(self) -> tuple[int, int, int, tuple[int, int] | None] | None:
        """The read that failed, where in its file, an errno (0: the file ends there), and for a damaged block the
        CRC32C stored and found.
        """

    def buffer(self, read: int) -> NDArray[np.uint8]: ...
    def release(self, read: int) -> None: ...
    def next_to_fill(self, deadline_s: float) -> int | None: ...
    def filled(self, read: int) -> None: ...
    def stop(self) -> None: ...

def place(
    data: NDArray[np.uint8], block_bytes: int, blocks: Sequence[Blocks], copies: Sequence[Copy]
) -> tuple[int, int, int] | None:
    """Verify and copy `data` as a Reader does. The offset of the first damaged block, its CRC32C stored and found: then
    nothing was copied. Raises ValueError for blocks and copies outside of `data`.
    """
