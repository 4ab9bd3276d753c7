"""Credentials stay out of everything that is shown or stored: URLs, errors, logs, manifests, traces."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^?#]*)(?:([?#])(.*))?", re.DOTALL)
# Where the text before the @ is no credential, as long as no password follows it: a container, or the name of a user.
_NAMES = frozenset({"abfs", "abfss", "wasb", "wasbs", "sftp", "ssh", "ftp", "smb", "hdfs", "webhdfs"})
_SENSITIVE = re.compile(
    r"secret|token|passw|passphrase|pwd|key|credential|sas|sig|auth|cert|connection_string|session|cookie|header"
)
SHORTEST = 4
"""Characters of the shortest text that is searched for: shorter ones would tear holes into every message."""


def redact_url(url: str) -> str:
    """`url` as it may be shown: without user and password, and what follows a `?` or `#`. A path stays as it is.

    >>> redact_url("sftp://me:secret@host/runs/7"), redact_url("abfs://box@account.dfs.core.windows.net/run")
    ('sftp://***@host/runs/7', 'abfs://box@account.dfs.core.windows.net/run')
    >>> redact_url("https://host/run?X-Amz-Signature=5f2c")
    'https://host/run?***'
    """
    found = _URL.fullmatch(url)
    if found is None:
        return url
    scheme, place, mark, rest = found.groups()
    user, at = _user(scheme, place)
    shown = f"{scheme}://{HIDDEN}{place[at:]}" if user else f"{scheme}://{place}"
    return shown + (f"{mark}{HIDDEN}" if rest else "")


class Secrets:
    """What a URL and the options of a storage hold that must not be shown. Its own repr shows none of it."""

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        found = {*_of_url(url), *_of_options(options, sensitive=False)}
        spellings = {unquote(text) for text in found} | found
        # The longest first: one may be a part of another.
        self._texts = sorted((text for text in spellings if len(text) >= SHORTEST), key=len, reverse=True)

    def hide(self, text: str) -> str:
        """`text` with every secret replaced."""
        for secret in self._texts:
            text = text.replace(secret, HIDDEN)
        return text

    def harmless(self, error: BaseException) -> BaseException | None:
        """`error` for a `raise ... from`; None when it, or what it was raised from, would print a secret."""
        shown = all(self.hide(text) == text for one in _chain(error) for text in (str(one), repr(one)))
        return error if shown else None


def _user(scheme: str, place: str) -> tuple[str, int]:
    """The credentials in front of the host, and where their @ is; an unquoted / or @ in a password is part of it."""
    at = place.rfind("@")
    if at >= 0 and ":" in place[:at]:
        return place[:at], at
    at = place.partition("/")[0].rfind("@")
    return ("", 0) if at < 0 or scheme.lower() in _NAMES else (place[:at], at)


def _of_url(url: str) -> Iterator[str]:
    found = _URL.fullmatch(url)
    if found is None:
        return
    scheme, place, _, rest = found.groups()
    user, _ = _user(scheme, place)
    if user:
        yield from (user, *user.split(":", 1))
    for part in re.split("[&;]", rest or ""):
        yield part.partition("=")[2] or part


def _of_options(value: Any, sensitive: bool) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _of_options(inner, sensitive or bool(_SENSITIVE.search(str(name).lower())))
    elif isinstance(value, bytes):
        yield from _of_options(value.decode(errors="replace"), sensitive)
    elif isinstance(value, str):
        yield from [value] if sensitive else _of_url(value)
    elif isinstance(value, Iterable):
        for inner in value:
            yield from _of_options(inner, sensitive)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
