"""Small objects as a file system of fsspec can put them, and whether it can where there is none: that is tried.

`pipe_file(mode="create")` is a condition at few of them. Many look whether the name is free and write then, so that two
who look at once both win. A rename is one where it refuses a name that is taken, as HDFS and SMB do.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

from dscheck.storage.adapter.connect import there

Put = Callable[[Any, str, bytes], bool]

ROUNDS = 4
"""Races of two. What looks first is caught by the blind rival already: these are for servers that lose a condition."""

_LOOKS = {"exists": False, "lexists": False, "isfile": False, "info": FileNotFoundError, "ls": FileNotFoundError}


def create(fs: Any, path: str, data: bytes) -> bool:
    """By `pipe_file(mode="create")`."""
    try:
        fs.pipe_file(path, data, mode="create")
    except Exception as error:
        if _says_taken(error):
            return False
        raise
    return True


def rename(fs: Any, path: str, data: bytes) -> bool:
    """Written beside, under a name that no listing shows, and renamed. False when that was refused."""
    with beside(fs, path.rpartition("/")[0]) as temporary:
        fs.pipe_file(temporary, data)
        try:
            fs.mv(temporary, path)
        except Exception:
            if there(fs, path):
                return False
            raise
        return not there(fs, temporary)


def replace(fs: Any, path: str, data: bytes) -> bool:
    """Whatever was there before. True."""
    fs.pipe_file(path, data)
    return True


@contextmanager
def beside(fs: Any, folder: str) -> Iterator[str]:
    """A path in `folder` that no listing shows, and where nothing is left."""
    path = f"{folder}/.put-{uuid.uuid4().hex}"
    try:
        yield path
    finally:
        with suppress(Exception):
            fs.rm_file(path)


def refutes(connect: Callable[[], Any], folder: str, put: Put) -> str | None:
    """What was seen that a `put` with a condition cannot do, None when it did not; in `folder`, which exists.

    Raises what the first of all puts raises.
    """
    fs = connect()
    with beside(fs, folder) as path:
        if not put(fs, path, b"first"):
            return "it says that a new name is taken"
        if _wins(put, _blind(connect()), path, b"second") or fs.cat_file(path) != b"first":
            return "a second put replaced the first one, as soon as it did not see it"
    for number in range(ROUNDS):
        with beside(fs, folder) as path:
            winners = _race(connect, put, path)
            if len(winners) != 1 or fs.cat_file(path) != winners[0]:
                return f"of two puts at once {len(winners)} won, in round {number + 1}"
    return None


def _race(connect: Callable[[], Any], put: Put, path: str) -> list[bytes]:
    start = threading.Barrier(2, timeout=60)

    def run(data: bytes) -> bool:
        fs = connect()
        start.wait()
        return _wins(put, fs, path, data)

    rivals = [b"one", b"other"]
    with ThreadPoolExecutor(2) as pool:
        return [data for data, won in zip(rivals, pool.map(run, rivals), strict=True) if won]


def _wins(put: Put, fs: Any, path: str, data: bytes) -> bool:
    try:
        return put(fs, path, data)
    except Exception:
        return False


def _blind(fs: Any) -> Any:
    """`fs`, to which every name is free when it looks: what a rival sees that looked a moment too early."""
    for name, seen in _LOOKS.items():
        setattr(fs, name, _answer(seen))
        if hasattr(fs, f"_{name}"):
            setattr(fs, f"_{name}", _answer_later(seen))
    return fs


def _answer(seen: Any) -> Callable[..., Any]:
    def answer(*args: Any, **kwargs: Any) -> Any:
        if isinstance(seen, type):
            raise seen(*args)
        return seen

    return answer


def _answer_later(seen: Any) -> Callable[..., Any]:
    async def answer(*args: Any, **kwargs: Any) -> Any:
        return _answer(seen)(*args)

    return answer


def _says_taken(error: BaseException | None) -> bool:
    """Whether a put lost: by the exception that fsspec asks for, or by HTTP's 412 somewhere below."""
    while error is not None:
        if isinstance(error, FileExistsError):
            return True
        response = getattr(error, "response", None)
        told = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
        statuses = (
            told.get("HTTPStatusCode"),
            *(getattr(error, name, None) for name in ("code", "status", "status_code")),
        )
        if 412 in statuses:
            return True
        error = error.__cause__
    return False
