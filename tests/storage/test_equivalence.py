"""MemoryStorage stands in for LocalStorage in most tests, so whatever is done to both must have the same outcome."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from dscheck.storage import LocalStorage, MemoryStorage
from dscheck.storage.base import ObjectWriter

# No key is a folder of another: a file system cannot have that, and memory does not care.
KEYS = st.sampled_from(["a", "b/c", "b/d", "b/cc", "e/f/g", "e/f/h", ".x", "b/../a", "b//c"])
PREFIXES = st.sampled_from(["", "a", "b/", "b/c", "e/", "e/f/", "none/", "../", ".x"])
BYTES = st.binary(max_size=40)
PLACES = st.integers(-2, 50)
Pair = tuple[ObjectWriter, ObjectWriter]


def outcome(call: Callable[[], Any]) -> Any:
    """What a call gives, or the type of what it raises."""
    try:
        return call()
    except Exception as error:
        return type(error)


class BothStorages(RuleBasedStateMachine):
    writers = Bundle("writers")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.mkdtemp()
        self.local = LocalStorage(os.path.join(self.folder, "root"))
        self.memory = MemoryStorage()
        # What a sync costs is not what is compared here.
        self.patch = patch.object(os, "fsync", lambda fd: None)
        self.patch.start()

    def teardown(self) -> None:
        self.patch.stop()
        shutil.rmtree(self.folder)

    def same(self, local: Callable[[], Any], memory: Callable[[], Any]) -> Any:
        outcomes = outcome(local), outcome(memory)
        assert outcomes[0] == outcomes[1]
        return outcomes[0]

    @rule(key=KEYS, data=BYTES)
    def put(self, key: str, data: bytes) -> None:
        self.same(lambda: self.local.put_if_absent(key, data), lambda: self.memory.put_if_absent(key, data))

    @rule(target=writers, key=KEYS)
    def create(self, key: str) -> Pair | None:
        local, memory = outcome(lambda: self.local.create(key)), outcome(lambda: self.memory.create(key))
        if isinstance(local, type) or isinstance(memory, type):
            assert local is memory
            return None
        return local, memory

    @rule(writers=writers, data=BYTES)
    def write(self, writers: Pair | None, data: bytes) -> None:
        if writers:
            self.same(lambda: writers[0].write(data), lambda: writers[1].write(data))

    @rule(writers=writers)
    def commit(self, writers: Pair | None) -> None:
        if writers:
            self.same(writers[0].commit, writers[1].commit)

    @rule(writers=writers)
    def abort(self, writers: Pair | None) -> None:
        if writers:
            self.same(writers[0].abort, writers[1].abort)

    @rule(key=KEYS, offset=PLACES, length=st.none() | PLACES)
    def read(self, key: str, offset: int, length: int | None) -> None:
        self.same(lambda: self.local.read(key, offset, length), lambda: self.memory.read(key, offset, length))

    @rule(key=KEYS, offset=PLACES, size=st.integers(0, 50))
    def read_into(self, key: str, offset: int, size: int) -> None:
        buffers = bytearray(size), bytearray(size)
        self.same(
            lambda: self.local.read_into(key, offset, memoryview(buffers[0])),
            lambda: self.memory.read_into(key, offset, memoryview(buffers[1])),
        )
        assert buffers[0] == buffers[1]

    @rule(key=KEYS)
    def delete(self, key: str) -> None:
        self.same(lambda: self.local.delete(key), lambda: self.memory.delete(key))

    @rule(prefix=PREFIXES)
    def list_below(self, prefix: str) -> None:
        self.same(lambda: set(self.local.list(prefix)), lambda: set(self.memory.list(prefix)))

    @invariant()
    def hold_the_same(self) -> None:
        assert set(self.local.list("")) == set(self.memory.list(""))
        for entry in self.memory.list(""):
            assert self.local.read(entry.key) == self.memory.read(entry.key)


TestBothStorages = BothStorages.TestCase
TestBothStorages.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
