"""Invariant C3: ranks of a running training are killed at random moments, and the newest step is old or new, whole.

DSCHECK_KILLS says how many times (20).
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dscheck.commit import read_history
from dscheck.commit.contents import Contents
from dscheck.commit.verify import verify
from dscheck.storage import LocalStorage
from tests.processes.lives import RANKS, TIMEOUT_S, live, live_under_agent, undisturbed
from tests.processes.pool import Ended, Job
from tests.processes.roots import newest

KILLS = int(os.environ.get("DSCHECK_KILLS", "20"))
CHAINS = 2
"""Roots that are lived in at once: a life mostly waits."""
AGENTS = max(4, KILLS // 10)
LAST = 60
"""No life trains further."""
STEP_S, START_S = 0.1, 0.5
"""About what a step with its save takes, and a start with its load."""


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """What each rank holds at each step of a training that nobody disturbs."""
    found: list[list[str]] = Job(tmp_path_factory.mktemp("undisturbed") / "job", RANKS, undisturbed, LAST).results()
    return found


@dataclass
class Root:
    """A root, and what may be its newest step: what was known to be committed, or anything tried since."""

    path: Path
    wanted: list[list[str]]
    old: int = 0
    new: int = 0
    lives: int = 0
    loads: int = 0

    def learn(self, ended: list[Ended]) -> None:
        """Check what the ranks of one life found when they loaded, and take in what they saved."""
        loaded = [note for rank in ended for note in notes(rank, "loaded")]
        for rank in ended:
            for _, step, digest in notes(rank, "loaded"):
                assert self.old <= step <= self.new, (self.path, step, self.old, self.new)
                assert digest == self.wanted[rank.rank][step], (
                    f"{self.path}: rank {rank.rank} holds another step {step}"
                )
        assert len({step for _, step, _ in loaded}) <= 1
        if loaded:
            self.old = self.new = loaded[0][1]
            self.loads += 1
        self.old = max([self.old, *(step for rank in ended for _, step in notes(rank, "committed"))])
        self.new = max([self.new, *(step for rank in ended for _, step in notes(rank, "saving"))])
        assert self.new - self.old <= 2
        self.lives += 1


def notes(ended: Ended, kind: str) -> Iterator[Any]:
    return (note for _, note in ended.notes if note[0] == kind)


@dataclass
class Chain:
    """Lives one after the other, each killed, in few roots."""

    folder: Path
    wanted: list[list[str]]
    random: random.Random
    roots: list[Root] = field(default_factory=list)
    hits: int = 0

    def run(self, kills: int) -> Chain:
        for number in range(kills):
            if not self.roots or self.roots[-1].new > LAST // 2:
                self.roots.append(Root(self.folder / f"root-{number}", self.wanted))
            self._kill_once(self.roots[-1], self.folder / f"life-{number}")
        return self

    def _kill_once(self, root: Root, folder: Path) -> None:
        victims = self.random.choice([[0], [1], [2], list(range(RANKS))])
        patient = self.random.random() < 0.4
        job = Job(folder, RANKS, live, str(root.path), LAST, patient)
        saves = self.random.randrange(6)
        if saves:
            job.wait_for(0, "saving", saves)
            time.sleep(self.random.uniform(0, STEP_S))
        else:
            victims = list(range(RANKS))  # one that dies while the group is set up has gloo wait for a minute
            time.sleep(self.random.uniform(0, START_S))
        at = job.kill(*victims)
        ended = job.join()
        assert all(rank.signal == 9 or rank.error is None for rank in ended if rank.rank in victims)
        self.hits += any(ended[rank].signal == 9 for rank in victims)
        root.learn(ended)
        for rank in ended:
            if rank.rank not in victims and rank.error is not None:
                _check_survivor(rank, ended, victims[0], at)


def _check_survivor(rank: Ended, ended: list[Ended], victim: int, killed_at: float) -> None:
    """It ended by itself in time, and its save said who was missing: the victim, or one that gave up before.

    Two saves may find the victim missing, one after the other.
    """
    assert rank.signal is None
    assert rank.at - killed_at < 2 * TIMEOUT_S + 5
    for at, note in rank.notes:
        if note[0] == "failed" and at > killed_at:
            gone = {victim} | {other.rank for other in ended if other.at and other.at < at}
            assert gone & set(note[2].fields["ranks"]), note[2]


@pytest.mark.timeout(120 + 6 * KILLS)
def test_a_kill_at_any_moment_leaves_old_or_new(wanted: list[list[str]], tmp_path: Path) -> None:
    """The step is loaded by the next life on all ranks, and compared with what an undisturbed training held."""
    chains = [Chain(tmp_path / str(number), wanted, random.Random(number)) for number in range(CHAINS)]
    with ThreadPoolExecutor(CHAINS) as pool:
        list(pool.map(lambda chain: chain.run(KILLS // CHAINS), chains))
    roots = [root for chain in chains for root in chain.roots]
    assert sum(chain.hits for chain in chains) > 0.8 * KILLS
    for root in roots:
        ended = Job(tmp_path / f"last-{root.path.parent.name}-{root.path.name}", RANKS, live, str(root.path), 0, False)
        root.learn(ended.join())
        assert_sound(root.path)
    # Enough of them fell into training.
    assert sum(root.new for root in roots) > KILLS


def assert_sound(root: Path) -> None:
    """Every step that any term committed is whole."""
    storage = LocalStorage(root)
    history = read_history(storage)
    for ref in (*history.visible, *history.abandoned):
        contents = Contents.open(storage, history.record(ref))
        assert list(verify(contents, lambda nbytes: None)) == []


@pytest.mark.timeout(120 + 2 * KILLS)
def test_an_agent_restarts_a_training_that_was_killed(wanted: list[list[str]], tmp_path: Path) -> None:
    """torch's elastic agent ends the others 0.1 s later and starts all anew: they go on from old or new."""
    with ThreadPoolExecutor(CHAINS) as pool:
        restarted = list(pool.map(lambda number: restart_once(number, wanted, tmp_path), range(AGENTS)))
    assert sum(restarted) > AGENTS // 2


def restart_once(number: int, wanted: list[list[str]], folder: Path) -> bool:
    """Whether the kill came before the training had ended by itself."""
    drawn, last, root = random.Random(number), 20, folder / f"root-{number}"
    args = (str(root), last, drawn.randrange(RANKS), drawn.uniform(0.1, 0.8))
    [agent] = Job(folder / f"agent-{number}", 1, live_under_agent, *args, group=False).join()
    agent.result()
    starts = [index for index, (_, note) in enumerate(agent.notes) if note == ("start", False)]
    first = agent.notes[: starts[0]] if starts else agent.notes
    second = agent.notes[starts[0] :] if starts else []
    old = max([0, *(note[1] for _, note in first if note[0] == "committed")])
    new = max([0, *(note[1] for _, note in first if note[0] == "saving")])
    held = {step: {digests[step] for digests in wanted} for step in range(old, new + 1)}
    loaded = [note for _, note in second if note[0] == "loaded"]
    assert len(loaded) == (RANKS if starts else 0)
    assert len({step for _, step, _ in loaded}) <= 1
    assert all(old <= step <= new and digest in held[step] for _, step, digest in loaded)
    assert newest(root).record.step == last
    assert_sound(root)
    return bool(starts)
