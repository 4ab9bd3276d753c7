"""TRAPS 23: What depends on the structure of a state alone is made once, and what need not be in the call is not."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import pytest
import torch

from dscheck import sharded
from dscheck.ranks.base import Ranks
from dscheck.save import attempt
from dscheck.save.holdings import Holdings
from dscheck.snapshot import Capturer
from tests.end_to_end.worlds import fresh, job, open_on


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts what is made, by "what" and by "what on which thread"."""
    counts: Counter[str] = Counter()

    def count(owner: Any, name: str, what: str) -> None:
        real = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            counts.update([what, f"{what} on {threading.current_thread().name}"])
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count(Holdings, "of", "claims")
    count(Capturer, "plan", "plan")
    count(attempt, "encode_objects", "text")
    return counts


def test_claims_and_plan_of_one_rank_are_made_once(made: Counter[str]) -> None:
    def run(ranks: Ranks) -> None:
        with open_on(ranks, fresh(), {"x": torch.ones(3), "n": 1}) as ckpt:
            for step in range(1, 6):
                ckpt.save(step).wait()

    job(1, run)
    assert (made["claims"], made["plan"]) == (1, 1)
    assert made["text on dscheck-save"] == made["text"] == 10


def test_a_changed_plan_of_several_ranks_is_made_in_the_background(made: Counter[str]) -> None:
    """Ranks sample all that they hold for the first plan, and only what needs comparing for later ones."""
    root = fresh()

    def run(ranks: Ranks) -> None:
        state = {"x": sharded(torch.ones(2), (4,), (2 * ranks.rank,)), "all": torch.ones(5)}
        with open_on(ranks, root, state) as ckpt:
            for step in range(1, 6):
                ckpt.save(step).wait()

    job(2, run)
    assert made["claims"] == 2
    assert made["plan on dscheck-save"] == made["plan"] - 2


def test_a_new_structure_is_planned_once(made: Counter[str]) -> None:
    def run(ranks: Ranks) -> None:
        state = {"x": torch.ones(3)}
        with open_on(ranks, fresh(), state) as ckpt:
            ckpt.save(1).wait()
            state["y"] = torch.ones(4)
            for step in range(2, 6):
                ckpt.save(step).wait()

    job(1, run)
    assert (made["claims"], made["plan"]) == (2, 2)


def test_memory_and_plan_are_ready_once_every_optimizer_has_stepped(made: Counter[str]) -> None:
    def run(ranks: Ranks) -> None:
        nets = {name: torch.nn.Linear(2, 2) for name in "ab"}
        opts = {f"opt_{name}": torch.optim.AdamW(net.parameters()) for name, net in nets.items()}
        with open_on(ranks, fresh(), {**nets, **opts}) as ckpt:
            for name, net in nets.items():
                net(torch.ones(1, 2)).sum().backward()
                assert made["plan"] == 0
                opts[f"opt_{name}"].step()
            assert (made["claims"], made["plan"]) == (1, 1)
            ckpt.save(1).wait()
            assert (made["claims"], made["plan"]) == (1, 1)

    job(1, run)


def test_a_module_that_took_anothers_place_is_fenced() -> None:
    root = fresh()

    def run(ranks: Ranks) -> list[float]:
        state = {"net": torch.nn.Linear(2, 2)}
        with open_on(ranks, root, state) as ckpt:
            ckpt.save(1).wait()
            state["net"] = torch.nn.Linear(2, 2)
            handle = ckpt.save(2)
            state["net"].load_state_dict({"weight": torch.zeros(2, 2), "bias": torch.zeros(2)})
            handle.wait()
            return [float(hook is not None) for hook in state["net"]._load_state_dict_pre_hooks.values()]

    assert job(1, run) == [[1.0]]
