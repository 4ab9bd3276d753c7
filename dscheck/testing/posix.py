"""A model of a POSIX disk: records what reaches the kernel below one directory, and says what a power cut leaves.

POSIX promises this much: fsync of a file makes its bytes durable, not its name; fsync of a directory makes its entries
durable, not what they name. Everything else may be there or not, each change for itself.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch


@dataclass(frozen=True)
class Event:
    """One call that succeeded: on `path`, with its bytes or its other path in `data`; or a test's own "mark"."""

    name: str
    path: str = ""
    data: Any = None


@dataclass
class File:
    synced: bytes = b""
    written: bytes = b""


@dataclass
class Folder:
    durable: dict[str, File | Folder] = field(default_factory=dict)
    pending: list[tuple[str, File | Folder | None]] = field(default_factory=list)


class Disk:
    """The calls that succeeded below the directory `base`, in order, while `recording` was on."""

    def __init__(self, base: str) -> None:
        self.base = base
        self.events: list[Event] = []
        self._paths: dict[int, str] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """The functions of `os` that change a disk note what they did, in all threads of this process."""
        notes: dict[str, Callable[..., object]] = {
            "open": self._opened,
            "write": lambda count, fd, data: self._note("write", self._paths.get(fd), bytes(data[:count])),
            "fsync": lambda result, fd: self._note("fsync", self._paths.get(fd)),
            "link": lambda result, source, target: self._note("link", target, source),
            "unlink": lambda result, path: self._note("unlink", path),
            "mkdir": lambda result, path, *mode: self._note("mkdir", path),
            "rmdir": lambda result, path: self._note("rmdir", path),
        }
        with ExitStack() as stack:
            for name, note in notes.items():
                stack.enter_context(patch.object(os, name, _recorded(getattr(os, name), note)))
            # Behind what native threads have written, before this process writes on.
            stack.enter_context(patch.object(os, "lseek", _recorded(os.lseek, self._filled)))
            yield

    def after_cut(self, luck: random.Random, events: Iterable[Event] | None = None) -> dict[str, bytes]:
        """The files below the base, by path relative to it, when the power goes after `events` (all, if not given)."""
        top = Folder()
        live: dict[str, File | Folder] = {self.base: top}
        for event in self.events if events is None else events:
            _apply(live, event)
        return dict(_remains("", top, luck))

    def mark(self, what: object) -> None:
        self.events.append(Event("mark", data=what))

    def calls(self) -> list[str]:
        """The events as "name path", relative to the base; a temporary file is "*"."""
        return [f"{event.name} {self._short(event.path)}" for event in self.events if event.name != "mark"]

    def _opened(self, fd: int, path: Any, flags: int, *mode: int) -> None:
        self._paths[fd] = path
        if flags & os.O_CREAT:
            self._note("create", path)

    def _filled(self, end: int, fd: int, *where: int) -> None:
        """Native threads have written the file up to where it is written on from Python."""
        path = self._paths.get(fd)
        if path is not None:
            with open(path, "rb") as file:
                self._note("write", path, file.read(end))

    def _note(self, name: str, path: Any, data: Any = None) -> None:
        if isinstance(path, str) and (path + "/").startswith(self.base + "/"):
            self.events.append(Event(name, path, data))

    def _short(self, path: str) -> str:
        folder, name = os.path.split(os.path.relpath(path, self.base))
        return os.path.join(folder, "*" if name.startswith(".put-") else name)


_IN_TURN = threading.RLock()
"""Held from the call to its note: else what one thread does in a folder may be noted before the folder of another."""


def _recorded(call: Callable[..., Any], note: Callable[..., object]) -> Callable[..., Any]:
    def recorded(*args: Any, **kwargs: Any) -> Any:
        with _IN_TURN:
            result = call(*args, **kwargs)
            note(result, *args)
            return result

    return recorded


def _apply(live: dict[str, File | Folder], event: Event) -> None:
    node = live.get(event.path)
    if event.name == "write" and isinstance(node, File):
        node.written += event.data
    elif event.name == "fsync" and isinstance(node, File):
        node.synced = node.written
    elif event.name == "fsync" and isinstance(node, Folder):
        for name, child in node.pending:
            _set(node.durable, name, child)
        node.pending.clear()
    elif event.name in ("create", "mkdir", "link"):
        made = File() if event.name == "create" else Folder() if event.name == "mkdir" else live[event.data]
        live[event.path] = made
        _parent(live, event).pending.append((os.path.basename(event.path), made))
    elif event.name in ("unlink", "rmdir"):
        del live[event.path]
        _parent(live, event).pending.append((os.path.basename(event.path), None))


def _parent(live: dict[str, File | Folder], event: Event) -> Folder:
    parent = live[os.path.dirname(event.path)]
    assert isinstance(parent, Folder)
    return parent


def _set(entries: dict[str, File | Folder], name: str, child: File | Folder | None) -> None:
    if child is None:
        entries.pop(name, None)
    else:
        entries[name] = child


def _remains(path: str, folder: Folder, luck: random.Random) -> Iterable[tuple[str, bytes]]:
    entries = dict(folder.durable)
    for name, child in folder.pending:
        if luck.random() < 0.5:
            _set(entries, name, child)
    for name, child in entries.items():
        if isinstance(child, Folder):
            yield from _remains(os.path.join(path, name), child, luck)
        else:
            loose = child.written[len(child.synced) :]
            kept = loose[: luck.randint(0, len(loose))]
            zeros = bytes(luck.choice([0, len(loose) - len(kept)]))
            yield os.path.join(path, name), child.synced + kept + zeros
