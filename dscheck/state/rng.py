"""The random streams of a process: Python's, NumPy's legacy one, torch's on the CPU and on the accelerator."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dscheck.errors import StateError

KEY = "dscheck.rng"
_SAMPLED_RANKS = 64
_used: list[torch.device] = []


def capture() -> Callable[[], dict[str, Any]]:
    """Take the state of every stream now; what is returned makes it plain data, at any time and on any thread.

    An accelerator that the process has not used yet has none.
    """
    python, legacy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    device = _accelerator()
    states = [] if device is None else [_module(at).get_rng_state(at) for at in _from_current(device)]

    def described() -> dict[str, Any]:
        state = {"python": _python(*python), "numpy": _numpy(*legacy), "torch": _bytes(cpu)}
        if device is not None:
            state["accelerator"] = {"kind": device.type, "states": [_bytes(found) for found in states]}
        return state

    return described


def _python(version: int, words: tuple[int, ...], gauss: float | None) -> dict[str, Any]:
    return {"version": version, "words": np.array(words, np.uint32).tobytes(), "gauss": gauss}


def _numpy(kind: Any, keys: Any, position: Any, has_gauss: Any, cached: Any) -> dict[str, Any]:
    return {
        "kind": str(kind),
        "keys": np.asarray(keys, np.uint32).tobytes(),
        "position": int(position),
        "has_gauss": int(has_gauss),
        "cached": float(cached),
    }


def _bytes(state: torch.Tensor) -> bytes:
    return state.cpu().numpy().tobytes()


def restore(saved: Mapping[str, Any]) -> bool:
    """Put all streams back as they were saved. Returns whether each one could be: another accelerator cannot."""
    exact = (_accelerator() is not None) <= ("accelerator" in saved)
    for stream, put in _STREAMS.items():
        if stream in saved:
            exact = put(saved[stream], None) and exact
    return exact


def derive(states: Sequence[Mapping[str, Any]], rank: int, world: int) -> None:
    """Streams for another number of ranks; `states` are those of all saved ranks, or of a sample when there are many.

    One that was the same on several saved ranks, and on all of them, goes on as it was on every rank: what the ranks
    drew together they still draw together. Any other is seeded from all the saved ones and the rank: always the same
    for one checkpoint, rank and number of ranks, and another on each rank.
    """
    for stream, put in _STREAMS.items():
        saved = [state[stream] for state in states if stream in state]
        if saved:
            together = len(saved) > 1 and all(value == saved[0] for value in saved)
            put(saved[0], None if together else _seed(saved, rank, world))


def sampled(saved_world: int) -> list[int]:
    """The saved ranks that a derived stream comes from: all, or 64 spread evenly."""
    if saved_world <= _SAMPLED_RANKS:
        return list(range(saved_world))
    return [index * (saved_world - 1) // (_SAMPLED_RANKS - 1) for index in range(_SAMPLED_RANKS)]


def _seed(saved: Sequence[Any], rank: int, world: int) -> int:
    digest = hashlib.sha256(repr((saved, rank, world)).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def _put_python(saved: Mapping[str, Any], seed: int | None) -> bool:
    if seed is not None:
        random.seed(seed)
        return False
    words = tuple(np.frombuffer(saved["words"], np.uint32).tolist())
    random.setstate((saved["version"], words, saved["gauss"]))
    return True


def _put_numpy(saved: Mapping[str, Any], seed: int | None) -> bool:
    if seed is not None:
        np.random.seed(np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint32))
        return False
    keys = np.frombuffer(saved["keys"], np.uint32)
    np.random.set_state((saved["kind"], keys, saved["position"], saved["has_gauss"], saved["cached"]))
    return True


def _put_torch(saved: bytes, seed: int | None) -> bool:
    if seed is not None:
        torch.default_generator.manual_seed(seed)
        return False
    torch.set_rng_state(_as_tensor(saved))
    return True


def _put_accelerator(saved: Mapping[str, Any], seed: int | None) -> bool:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None or device.type != saved["kind"]:
        return False
    devices = _from_current(device)
    if seed is not None:
        for at in devices:
            _module(at).default_generators[at.index].manual_seed(seed)
        return False
    for at, state in zip(devices, saved["states"], strict=False):
        _module(at).set_rng_state(_as_tensor(state), at)
    return True


_STREAMS: dict[str, Callable[[Any, int | None], bool]] = {
    "python": _put_python,
    "numpy": _put_numpy,
    "torch": _put_torch,
    "accelerator": _put_accelerator,
}


def _as_tensor(state: bytes) -> torch.Tensor:
    if not state:
        raise StateError("the saved state of torch's random stream is empty", path=KEY)
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)


def _module(device: torch.device) -> Any:
    return getattr(torch, device.type)


def _accelerator() -> torch.device | None:
    """The accelerator's kind if this process has used it: asking for its state would set it up otherwise."""
    if not _used and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        if device is not None and getattr(_module(device), "is_initialized", lambda: True)():
            _used.append(device)  # for good; to ask the driver takes a third of a millisecond
    return _used[0] if _used else None


def _from_current(device: torch.device) -> list[torch.device]:
    """All devices of the process, the current one first: a rank's streams follow it to a device of another number."""
    count, current = torch.accelerator.device_count(), torch.accelerator.current_device_index()
    return [torch.device(device.type, (current + step) % count) for step in range(count)]
