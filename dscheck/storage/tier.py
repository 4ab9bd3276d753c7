"""Where a job saves to: one shared storage, or a nearer one before it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dscheck.config import Keep, as_keep
from dscheck.errors import ConfigError
from dscheck.storage.base import Storage
from dscheck.storage.schemes import open_storage


@dataclass(frozen=True, slots=True)
class Tier:
    """One place of a job that saves to several: `root` as for a Checkpointer.

    node_local: it is another place on each node, such as its own disk; else all ranks see the same objects there. keep:
    which steps stay there; None: as the Checkpointer's setting says.
    """

    root: str | os.PathLike[str] | Storage
    node_local: bool = False
    keep: int | Keep | None = None

    def __post_init__(self) -> None:
        if self.keep is not None:
            as_keep(self.keep)


Root = str | os.PathLike[str] | Storage | Tier


@dataclass(frozen=True, slots=True)
class Tiers:
    """Where a job commits first (`near`), and the shared storage that everything is uploaded to; None: it is `near`.

    `keep`: of each, nearest first, as its Tier says.
    """

    near: Storage
    shared: Storage | None = None
    node_local: bool = False
    keep: tuple[Keep | None, ...] = (None, None)

    @property
    def storages(self) -> tuple[Storage, ...]:
        """Nearest first."""
        return (self.near,) if self.shared is None else (self.near, self.shared)


def open_tiers(root: Root | Sequence[Root], options: Mapping[str, Any] | None = None) -> Tiers:
    """The storages of one root, or of a near tier and the shared one, which the options are for.

    Raises ConfigError, as `open_storage` does, and when the last one is not shared by all nodes.
    """
    several = isinstance(root, Sequence) and not isinstance(root, str)
    roots: Sequence[Root] = root if several else (root,)  # type: ignore[assignment]
    tiers = [one if isinstance(one, Tier) else Tier(one) for one in roots]
    if not 1 <= len(tiers) <= 2:
        raise ConfigError(f"{len(tiers)} roots: expected one, or a near tier and the shared one behind it")
    if tiers[-1].node_local:
        raise ConfigError(
            f"{tiers[-1].root!r} is declared as local to a node, and nothing comes behind it: a lost node would take "
            "its steps along; give a shared tier as the last root"
        )
    storages = [open_storage(tier.root, options if tier is tiers[-1] else None) for tier in tiers]
    if len({storage.url for storage in storages}) < len(storages):
        raise ConfigError(f"both tiers are '{storages[0].url}': give two roots, or one")
    keep = tuple(None if tier.keep is None else as_keep(tier.keep) for tier in tiers)
    return Tiers(storages[0], storages[1] if len(storages) > 1 else None, tiers[0].node_local, keep)
