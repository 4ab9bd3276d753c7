"""Where plain objects live: how each kind is read at a save, and written back by a load."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from dscheck.errors import DscheckError, StateError, StateMismatchError

Put = Callable[[Any], None]


@dataclass(frozen=True, slots=True)
class Slot:
    """A plain object of the live state: `read` gives its value now, `write` puts a loaded one back.

    `check` raises StateMismatchError, before anything is touched, for one that `write` could not put back.
    """

    name: str
    read: Callable[[], Any]
    write: Put
    check: Put = lambda saved: None


def is_stateful(value: Any) -> bool:
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def called(name: str, what: str, call: Callable[..., Any], *args: Any) -> Any:
    """What the user's own code returns. Whatever it raises is a StateError that names the part of the state."""
    try:
        return call(*args)
    except DscheckError:
        raise
    except Exception as error:
        raise StateError(f"'{name}': {what} raised {type(error).__name__}: {error}", path=name) from error


def slot_of(name: str, value: Any, put: Put | None) -> Slot:
    """The slot of a value that is no module, optimizer or tensor of its own. `put` replaces it in its container.

    Raises StateError for a value that could be saved and not put back.
    """
    if is_stateful(value):
        kind = type(value).__name__
        return Slot(
            name,
            partial(called, name, f"{kind}.state_dict()", value.state_dict),
            partial(called, name, f"{kind}.load_state_dict()", value.load_state_dict),
        )
    if isinstance(value, torch.Generator):
        return _torch_slot(name, value)
    if isinstance(value, np.random.Generator | np.random.RandomState):
        return _numpy_slot(name, value)
    if isinstance(value, random.Random):
        return Slot(name, value.getstate, value.setstate)
    if isinstance(value, torch.Tensor):
        return _tensor_slot(name, value)
    if put is None and not _is_mutable(value):
        raise StateError(
            f"'{name}' is a {type(value).__name__} in a container that cannot be changed, so no load can put it back: "
            "use a list or a dict",
            path=name,
        )
    return Slot(name, lambda: value, lambda saved: _write_plain(name, value, saved, put))


def _torch_slot(name: str, generator: torch.Generator) -> Slot:
    kind = generator.device.type

    def check(saved: Any) -> None:
        _refuse_other(name, "generator", saved, "device", kind)

    def read() -> Any:
        return {"device": kind, "state": generator.get_state().cpu().numpy().tobytes()}

    def write(saved: Any) -> None:
        generator.set_state(torch.frombuffer(bytearray(saved["state"]), dtype=torch.uint8))

    return Slot(name, read, write, check)


def _numpy_slot(name: str, generator: np.random.Generator | np.random.RandomState) -> Slot:
    def read() -> Any:
        if isinstance(generator, np.random.RandomState):
            return generator.get_state(legacy=False)
        return generator.bit_generator.state

    def check(saved: Any) -> None:
        _refuse_other(name, "generator", saved, "bit_generator", read()["bit_generator"])

    def write(saved: Any) -> None:
        if isinstance(generator, np.random.RandomState):
            generator.set_state(saved)
        else:
            generator.bit_generator.state = saved

    return Slot(name, read, write, check)


def _refuse_other(name: str, what: str, saved: Any, key: str, live: str) -> None:
    """A random stream cannot be carried over to another kind of generator."""
    found = saved.get(key) if isinstance(saved, dict) else type(saved).__name__
    if found != live:
        raise StateMismatchError(f"{what} '{name}' has {key} {live} here and was saved with {found}", names=[name])


def _tensor_slot(name: str, live: torch.Tensor) -> Slot:
    def check(saved: Any) -> None:
        if not isinstance(saved, torch.Tensor) or saved.shape != live.shape or saved.dtype != live.dtype:
            found = f"{saved.dtype}{list(saved.shape)}" if isinstance(saved, torch.Tensor) else type(saved).__name__
            raise StateMismatchError(
                f"tensor '{name}' is {live.dtype}{list(live.shape)} here, and {found} is to be loaded", names=[name]
            )

    def write(saved: Any) -> None:
        check(saved)
        if saved is not live:
            live.detach().copy_(saved)

    return Slot(name, lambda: live, write, check)


_MUTABLE_MAPPINGS = (dict, OrderedDict, Counter, defaultdict)


def _is_mutable(value: Any) -> bool:
    return type(value) in (*_MUTABLE_MAPPINGS, list, deque, set, np.ndarray)


def _write_plain(name: str, live: Any, saved: Any, put: Put | None) -> None:
    """Change a container in place, so that whoever refers to it sees the loaded state; replace everything else."""
    if type(saved) is not type(live) or not _refill(live, saved):
        if put is None:
            raise StateMismatchError(
                f"'{name}' is a {type(live).__name__} and was saved as a {type(saved).__name__}: its container cannot "
                "be changed",
                names=[name],
            )
        put(saved)


def _refill(live: Any, saved: Any) -> bool:
    kind = type(live)
    if kind in _MUTABLE_MAPPINGS or kind is set:
        live.clear()
        live.update(saved)
    elif kind is list:
        live[:] = saved
    elif kind is deque and live.maxlen == saved.maxlen:
        live.clear()
        live.extend(saved)
    elif kind is np.ndarray and live.shape == saved.shape and live.dtype == saved.dtype and live.flags.writeable:
        live[...] = saved
    else:
        return False
    return True


def mapping_put(container: Mapping[str, Any], key: Any) -> Put | None:
    """What replaces the value under `key`; None when the container cannot be changed."""
    set_item = getattr(container, "__setitem__", None)
    return None if set_item is None else lambda value: set_item(key, value)
