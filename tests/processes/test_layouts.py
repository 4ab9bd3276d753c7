"""Saved by real ranks in one layout while training goes on, and loaded into the same, another and none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dscheck import Checkpointer
from tests.processes.pool import Job
from tests.processes.roots import newest
from tests.processes.training import Kind, build, whole

RANKS = {"plain": 1, "ddp": 2, "fsdp": 4, "hsdp": 4, "fsdp_over_tp": 4, "pipeline": 4}
OTHER = {"plain": "ddp", "ddp": "fsdp", "fsdp": "tp", "hsdp": "tp", "fsdp_over_tp": "fsdp", "pipeline": "fsdp"}
KIND = {"ddp": Kind(batch_norm=True), "pipeline": Kind(tied=False)}
STEP = 3


def save(rank: int, layout: str, kind: Kind, root: str) -> Any:
    """Train, save, and train on at once; what was held at the save, and the losses after it."""
    training = build(layout, kind, seed=1)
    with Checkpointer(root, training.state, timeout_s=60.0) as ckpt:
        for _ in range(STEP):
            training.step()
        held = training.holds()
        handle = ckpt.save(STEP)
        losses = [training.step() for _ in range(3)]
        handle.wait()
    return held, losses


def resume(rank: int, layout: str, kind: Kind, root: str, stepped: bool) -> Any:
    """Load into another training, `stepped` or as it was built; what is held then, the next losses, and the report."""
    training = build(layout, kind, seed=2)
    if stepped:
        training.step()
    with Checkpointer(root, training.state, timeout_s=60.0) as ckpt:
        assert ckpt.load() == STEP
        held = training.holds()
        return held, [training.step() for _ in range(3)], ckpt.loaded


@dataclass(frozen=True)
class Saved:
    root: str
    kind: Kind
    held: dict[str, Any]
    losses: list[list[float]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    """A root with one step, saved in a layout."""

    @cache
    def of(layout: str) -> Saved:
        folder = tmp_path_factory.mktemp(layout)
        kind, root = KIND.get(layout, Kind()), str(folder / "root")
        ranks = RANKS[layout]
        held, losses = zip(
            *Job(folder / "save", ranks, save, layout, kind, root, group=ranks > 1).results(), strict=True
        )
        # The next forward under DDP gives all ranks the statistics of the first.
        return Saved(root, kind, whole(held, apart="norm.running"), list(losses))

    return of


@pytest.mark.parametrize("stepped", [False, True], ids=["a fresh optimizer", "an optimizer that has stepped"])
@pytest.mark.parametrize("layout", RANKS)
def test_the_same_layout_goes_on_bit_for_bit(
    layout: str, stepped: bool, saved: Callable[[str], Saved], tmp_path: Path
) -> None:
    source, ranks = saved(layout), RANKS[layout]
    job = Job(tmp_path / "load", ranks, resume, layout, source.kind, source.root, stepped, group=ranks > 1)
    held, losses, reports = zip(*job.results(), strict=True)
    assert whole(held) == source.held
    assert list(losses) == source.losses
    assert all((report.rng, report.missing, report.unexpected) == ("exact", (), ()) for report in reports)


@pytest.mark.parametrize("layout", RANKS)
def test_another_layout_on_two_ranks_holds_the_same(layout: str, saved: Callable[[str], Saved], tmp_path: Path) -> None:
    source = saved(layout)
    job = Job(tmp_path / "load", 2, resume, OTHER[layout], source.kind, source.root, layout == "fsdp")
    held, losses, reports = zip(*job.results(), strict=True)
    assert whole(held) == source.held
    assert np.isfinite(losses).all()
    assert {report.rng for report in reports} == {"exact" if RANKS[layout] == 2 else "equivalent"}


@pytest.mark.parametrize("layout", [layout for layout in RANKS if layout != "plain"])
def test_one_rank_without_parallelism_holds_the_same(
    layout: str, saved: Callable[[str], Saved], tmp_path: Path
) -> None:
    source = saved(layout)
    job = Job(tmp_path / "load", 1, resume, "plain", source.kind, source.root, layout == "hsdp", group=False)
    [(held, losses, report)] = job.results()
    assert whole([held]) == source.held
    assert np.isfinite(losses).all()
    assert report.rng == "equivalent"


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "fsdp_over_tp"])
def test_tied_weights_are_saved_once_under_both_names(layout: str, saved: Callable[[str], Saved]) -> None:
    plan = newest(Path(saved(layout).root)).plan
    assert [row.names for row in plan.tensors if row.aliases] == [("model.embed.weight", "model.head.weight")]
