"""From a root to its Storage: by the scheme of its URL, which dscheck, an installed package or fsspec serves."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from dscheck.errors import ConfigError, DscheckError
from dscheck.storage.base import Storage
from dscheck.storage.local import LocalStorage
from dscheck.storage.memory import MemoryStorage
from dscheck.storage.redact import Secrets, redact_url

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "dscheck.storage"
"""The entry points by which a package adds a scheme: name = scheme, value = an `Opener`."""

Opener = Callable[[str, Mapping[str, Any]], Storage]
"""The whole URL and the options of the user → the storage, of which nothing is created yet."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)


def open_storage(root: str | os.PathLike[str] | Storage, options: Mapping[str, Any] | None = None) -> Storage:
    """The storage that `root` names: a path, a URL, or a Storage, which is returned as it is.

    `options` go to what opens a URL; paths, file:// and memory:// take none. Nothing is created: the first write does
    that. Raises ConfigError for a scheme that nothing serves, a plug-in that fails, a bad path and bad options.
    """
    if options is not None and not (isinstance(options, Mapping) and all(isinstance(name, str) for name in options)):
        raise ConfigError("storage_options: expected a mapping with texts as keys, such as {'anon': True}")
    if isinstance(root, Storage):
        _refuse_options("a Storage is open already, and", options)
        return root
    if not isinstance(root, (str, os.PathLike)):
        raise ConfigError(f"a root is a path, a URL or a Storage, not {root!r} of type {type(root).__name__}")
    url = _URL.fullmatch(root) if isinstance(root, str) else None
    if isinstance(root, str) and "::" in root and "://" in root:
        raise ConfigError(
            f"{_shown(root)!r} is a chain of file systems: caches and archives cannot hold checkpoints, name the store"
        )
    if url is None or not isinstance(root, str):
        _refuse_options("a path", options)
        return LocalStorage(root)
    return _open(url.group(1).lower(), root, options or {})


def _open(scheme: str, url: str, options: Mapping[str, Any]) -> Storage:
    if scheme in _IN_TREE:
        return _IN_TREE[scheme](url, options)
    plug_in = _plug_in(scheme)
    if plug_in is None:
        from dscheck.storage.adapter import FsspecStorage

        return FsspecStorage(url, options)
    return _open_by(plug_in, url, options)


def _open_by(plug_in: EntryPoint, url: str, options: Mapping[str, Any]) -> Storage:
    """What the plug-in makes of the URL. All that is wrong with it is said by its name."""
    secrets = Secrets(url, options)
    about = f"the storage plug-in for '{plug_in.name}://', {_described(plug_in)},"
    doing = "cannot be imported"
    try:
        opener = plug_in.load()
        doing = f"cannot open '{redact_url(url)}'"
        storage = opener(url, options)
    except DscheckError:
        raise
    except Exception as error:
        raise ConfigError(f"{about} {doing}: {secrets.hide(f'{type(error).__name__}: {error}')}") from (
            secrets.harmless(error)
        )
    if not isinstance(storage, Storage):
        raise ConfigError(
            f"{about} returned an object of type {type(storage).__name__}, which is no dscheck.storage.Storage: "
            f"it lacks {', '.join(name for name in _VERBS if not hasattr(storage, name))}"
        )
    if Secrets(url, {}).hide(storage.url) != storage.url:
        raise ConfigError(f"{about} shows credentials in its `url`: it is to pass dscheck.storage.redact_url")
    return storage


def _plug_in(scheme: str) -> EntryPoint | None:
    from importlib.metadata import entry_points

    found = list(entry_points(group=GROUP, name=scheme))
    if len(found) > 1:
        raise ConfigError(
            f"several packages serve '{scheme}://': {', '.join(sorted(map(_described, found)))}; uninstall all but one"
        )
    return found[0] if found else None


def _described(plug_in: EntryPoint) -> str:
    package = "an unknown package" if plug_in.dist is None else f"{plug_in.dist.name} {plug_in.dist.version}"
    return f"'{plug_in.value}' of {package}"


def _open_file(url: str, options: Mapping[str, Any]) -> Storage:
    _refuse_options("file://", options)
    rest = url.partition("://")[2]
    host, slash, path = rest.partition("/")
    if not slash or host not in ("", "localhost"):
        raise ConfigError(f"{_shown(url)!r} names no path of this host: write file:///absolute/path")
    return LocalStorage(unquote(slash + path))


def _open_memory(url: str, options: Mapping[str, Any]) -> Storage:
    _refuse_options("memory://", options)
    name = url.partition("://")[2].strip("/")
    if not name:
        raise ConfigError("a memory:// root needs a name, which is its identity in this process: memory://run")
    return MemoryStorage(name)


def _open_s3(url: str, options: Mapping[str, Any]) -> Storage:
    try:
        from dscheck.storage.s3 import S3Storage  # botocore takes 0.2 s to import
    except ImportError as error:
        raise ConfigError(f"s3:// needs a package that is missing: {error}; pip install 'dscheck[s3]'") from error
    return S3Storage(url.partition("://")[2], options)


def _refuse_options(who: str, options: Mapping[str, Any] | None) -> None:
    if options:
        # Their values may be credentials.
        raise ConfigError(f"{who} takes no storage_options: {', '.join(options)}")


def _shown(root: str) -> str:
    return redact_url(root.rpartition("::")[2])


_VERBS = ("url", "put_if_absent", "create", "read", "read_into", "list", "delete")

# Found without a look at what is installed. "local" is what fsspec calls it; here its files are synced.
_IN_TREE: dict[str, Opener] = {"file": _open_file, "local": _open_file, "memory": _open_memory, "s3": _open_s3}
