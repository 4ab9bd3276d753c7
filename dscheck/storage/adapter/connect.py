"""From a URL to the file systems of fsspec that serve it, and the errors of those that cannot."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from dscheck.errors import ConfigError, StorageError
from dscheck.storage.redact import Secrets, redact_url


class Connections:
    """The file systems of one URL. `fs` is one for all threads where it is asynchronous inside, else each thread's own,
    since fsspec promises no more. None keeps listings.

    Raises ConfigError for a scheme that fsspec does not know, a package that it needs and does not find, and options
    that its class does not take; StorageError when its server is not reached.
    """

    def __init__(self, url: str, options: Mapping[str, Any], secrets: Secrets) -> None:
        self._url, self._options, self._secrets = url, options, secrets
        self._class = _class(url.partition("://")[0].lower())
        self._threads = threading.local()
        self._shared = self._threads.fs = self.connect()
        self.root = str(self._class._strip_protocol(url)).rstrip("/")
        if not self.root:
            raise ConfigError(f"'{redact_url(url)}' names no place: a root is a bucket or a folder")
        if Secrets(url, {}).hide(self.root) != self.root:
            raise ConfigError(
                f"'{redact_url(url)}': {self.about} reads no credentials from a URL: give them as storage_options, or "
                "where it finds them by itself"
            )

    @property
    def about(self) -> str:
        """The class, for messages."""
        return f"{self._class.__module__}.{self._class.__name__}"

    @property
    def fs(self) -> Any:
        if self._class.async_impl:
            return self._shared
        if not hasattr(self._threads, "fs"):
            self._threads.fs = self.connect()
        return self._threads.fs

    @property
    def renames(self) -> bool:
        """Whether it is of files, which are seen while they grow, and which a rename puts in place whole.

        All of those are synchronous; gcsfs has a rename of its own for the sake of folders.
        """
        from fsspec import AbstractFileSystem

        return not self._class.async_impl and self._class.mv is not AbstractFileSystem.mv

    @property
    def has_create(self) -> bool:
        """Whether its `pipe_file` is its own: fsspec's looks whether the name is free, and writes then."""
        from fsspec import AbstractFileSystem
        from fsspec.asyn import AsyncFileSystem

        if self._class.pipe_file is not AbstractFileSystem.pipe_file:
            return True
        return getattr(self._class, "_pipe_file", None) not in (None, AsyncFileSystem._pipe_file)

    def connect(self) -> Any:
        """A file system of its own."""
        shown = redact_url(self._url)
        try:
            known = self._class._get_kwargs_from_urls(self._url)
            fs = self._class(**{**known, **self._options, "skip_instance_cache": True})
        except ImportError as error:
            raise ConfigError(f"'{shown}': {self._hide(error)}") from self._secrets.harmless(error)
        except OSError as error:
            raise StorageError(f"cannot reach '{shown}': {self._hide(error)}", url=shown, key="") from (
                self._secrets.harmless(error)
            )
        except Exception as error:
            names = f"; its options were {', '.join(self._options)}" if self._options else ""
            raise ConfigError(
                f"'{shown}': {self.about} cannot be opened: {self._hide(error)}{names}"
            ) from self._secrets.harmless(error)
        if hasattr(fs, "dircache"):
            fs.dircache.use_listings_cache = False
        return fs

    def _hide(self, error: Exception) -> str:
        return self._secrets.hide(f"{type(error).__name__}: {error}")


def _class(scheme: str) -> Any:
    try:
        from fsspec.registry import get_filesystem_class, known_implementations, registry
    except ImportError as error:
        raise ConfigError(f"'{scheme}://' needs fsspec, if that knows it: pip install 'dscheck[fsspec]'") from error
    if scheme not in known_implementations and scheme not in registry:
        raise ConfigError(
            f"no storage for '{scheme}://': it is none of dscheck's own, no installed package offers it as an entry "
            "point 'dscheck.storage', and fsspec does not know it either"
        )
    try:
        return get_filesystem_class(scheme)
    except ImportError as error:
        raise ConfigError(f"'{scheme}://': {error} (with pip)") from error


def there(fs: Any, path: str) -> bool:
    """Whether `path` is there. fsspec's `exists` takes every failure for a no."""
    try:
        fs.info(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
