"""Which keys a storage accepts: those that every back end can hold, and that cannot leave the root (C9)."""

from __future__ import annotations

from dscheck.errors import CorruptCheckpointError, StorageError

# S3 limits a key to 1024 bytes, POSIX file systems a name to 255.
MAX_KEY_BYTES = 1024
MAX_PART_BYTES = 255


def check_key(url: str, key: str) -> None:
    """Raises StorageError unless `key` is a relative path of plain names: none empty, none that begins with a dot.

    >>> check_key("memory://run", "records/300-2.json")
    """
    reason = _refusal(key, key.split("/"))
    if reason:
        raise StorageError(f"{key!r} is no key of '{url}': {reason}", url=url, key=key)


def check_prefix(url: str, prefix: str) -> None:
    """Raises StorageError unless `prefix` is empty or begins some key; its last part may be empty or unfinished."""
    parts = prefix.split("/")
    reason = _refusal(prefix, parts if parts[-1] else parts[:-1])
    if reason:
        raise StorageError(f"{prefix!r} begins no key of '{url}': {reason}", url=url, key=prefix)


def check_range(url: str, key: str, offset: int, length: int | None, size: int) -> None:
    """Raises CorruptCheckpointError when an object of `size` bytes has no [offset, offset + length).

    To be called before anything of that length is allocated: a damaged index may ask for any number (C9).
    """
    if offset < 0 or (length or 0) < 0:
        raise StorageError(f"'{url}/{key}': no range has offset {offset} and length {length}", url=url, key=key)
    if offset + (length or 0) > size:
        raise CorruptCheckpointError(
            f"'{url}/{key}' ends at byte {size}, and bytes [{offset}, {offset + (length or 0)}) were asked for; "
            "the object is damaged: load an earlier step, or run `dscheck verify`",
            url=url,
            key=key,
        )


def _refusal(key: str, parts: list[str]) -> str | None:
    try:
        encoded = key.encode()
    except UnicodeEncodeError:
        return "it is no valid Unicode text"
    if len(encoded) > MAX_KEY_BYTES or any(len(part.encode()) > MAX_PART_BYTES for part in parts):
        return f"at most {MAX_KEY_BYTES} bytes, and {MAX_PART_BYTES} between two slashes, fit every storage"
    if "\\" in key or any(ord(char) < 32 or ord(char) == 127 for char in key):
        return "backslashes and control characters mean different things to different storages"
    if "" in parts:
        return "a part between slashes is empty"
    if any(part.startswith(".") for part in parts):
        return "a part begins with a dot"
    return None
