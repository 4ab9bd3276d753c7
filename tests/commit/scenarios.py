"""The accidents that the model is put through: who is there, what the root holds, which faults may strike once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.commit.explorer import Scenario
from tests.commit.model import Claim, Committed, Rules, gc, job, loads, second_thought, zombie


def old(*commits: tuple[int, int]) -> frozenset[Committed]:
    """A step for each (term, step) of `commits`, of a job that is gone."""
    return frozenset(Committed(term, step, "old", ("plan", term, "p")) for term, step in commits)


def root(terms: dict[int, tuple[int, int] | None], commits: list[tuple[int, int]]) -> dict[tuple[Any, ...], Any]:
    """A store that holds `terms` (number -> parent) and a complete step for each (term, step) of `commits`."""
    records = old(*commits)
    store: dict[tuple[Any, ...], Any] = {}
    for number, parent in terms.items():
        store["term", number] = Claim("old", parent)
    for record in records:
        own = (record.term, record.step)
        store |= {record.plan: "p", ("data", *own): "old", ("files", *own): "old", ("record", *own): record}
    return store


def zombie_restart_and_gc(rules: Rules) -> Scenario:
    return Scenario(
        "a zombie, a restarted job and gc on one step",
        root({1: None}, [(1, 100)]),
        {"zombie": zombie(rules, "zombie", 1, (200,)), "job": job(rules, "job", (200,)), "gc": gc(rules)},
        faults=("lost", "ghost", "echo"),
        fragile=("record",),
        budget=1,
    )


def rollback_zombie_and_gc(rules: Rules) -> Scenario:
    return Scenario(
        "load(300) with 400 and 500 present, then 310, while the old job goes on",
        root({1: None}, [(1, 300), (1, 400), (1, 500)]),
        {
            "zombie": zombie(rules, "zombie", 1, (600,)),
            "job": job(rules, "job", (310,), resume=300),
            "gc": gc(rules),
        },
        faults=("lost", "ghost", "echo"),
        fragile=("record",),
        budget=1,
    )


def rollback_and_zombie(rules: Rules) -> Scenario:
    return Scenario(
        "load(300) with 400 and 500 present, then 310 and 320",
        root({1: None}, [(1, 300), (1, 400), (1, 500)]),
        {"zombie": zombie(rules, "zombie", 1, (600,)), "job": job(rules, "job", (310, 320), resume=300)},
    )


def fresh_start_over_an_old_run(rules: Rules) -> Scenario:
    return Scenario(
        "fresh=True over an old run that goes on",
        root({1: None}, [(1, 100), (1, 200)]),
        {
            "zombie": zombie(rules, "zombie", 1, (300,)),
            "job": job(rules, "job", (50,), resume="fresh"),
            "gc": gc(rules),
        },
        faults=("lost", "ghost", "echo"),
        fragile=("record",),
        budget=1,
    )


def two_jobs_and_a_zombie(rules: Rules) -> Scenario:
    return Scenario(
        "two restarted jobs and a zombie, claims with lost answers",
        root({1: None}, [(1, 100)]),
        {
            "zombie": zombie(rules, "zombie", 1, (200,)),
            "one": job(rules, "one", (200,)),
            "two": job(rules, "two", (200,)),
        },
        faults=("lost", "ghost", "echo"),
        fragile=("term",),
        budget=1,
    )


def two_zombies_job_and_gc(rules: Rules) -> Scenario:
    return Scenario(
        "the zombie that had gone back to 300, a job that does, too, and gc",
        root({1: None, 2: (1, 300)}, [(1, 300), (1, 500)]),
        {"zombie": zombie(rules, "zombie", 2, (310,)), "job": job(rules, "job", (320,)), "gc": gc(rules)},
        faults=("lost", "ghost", "echo"),
        fragile=("record",),
        budget=1,
    )


def fresh_start_amid_a_look(rules: Rules) -> Scenario:
    return Scenario(
        "the first record of a fresh start, and two restarted jobs that look meanwhile",
        root({1: None, 2: None}, [(1, 100)]),
        {
            "fresh": zombie(rules, "fresh", 2, (10,)),
            "one": job(rules, "one", (200,)),
            "two": job(rules, "two", (300,)),
        },
    )


def fresh_start_job_and_gc(rules: Rules) -> Scenario:
    return Scenario(
        "the first record of a fresh start, a job that continues the old run, and gc",
        root({1: None, 2: None}, [(1, 100)]),
        {"fresh": zombie(rules, "fresh", 2, (10,)), "job": job(rules, "job", (200,)), "gc": gc(rules)},
        faults=("lost", "ghost", "echo"),
        fragile=("record",),
        budget=1,
    )


def retention(rules: Rules) -> Scenario:
    return Scenario(
        "a job that keeps one step, and one that starts beside it",
        root({1: None}, [(1, 100)]),
        {
            "keeper": zombie(rules, "keeper", 1, (200, 300), lineage=old((1, 100)), keep=1),
            "job": job(rules, "job", (400,), keep=1),
        },
        faults=("lost", "ghost", "echo"),
        fragile=("record", "deleted"),
        budget=1,
    )


def retention_amid_a_takeover(rules: Rules) -> Scenario:
    return Scenario(
        "a job that keeps one step, one that starts beside it, and gc",
        root({1: None}, [(1, 100)]),
        {
            "keeper": zombie(rules, "keeper", 1, (200,), lineage=old((1, 100)), keep=1),
            "job": job(rules, "job", (300,)),
            "gc": gc(rules),
        },
        faults=("ghost", "echo"),
        fragile=("deleted",),
        budget=1,
    )


def retention_amid_a_rollback(rules: Rules) -> Scenario:
    return Scenario(
        "load(100) while the job of 100 and 200 goes on, and keeps one step; and gc",
        root({1: None}, [(1, 100), (1, 200)]),
        {
            "keeper": zombie(rules, "keeper", 1, (300,), lineage=old((1, 100), (1, 200)), keep=1),
            "job": job(rules, "job", (110,), resume=100),
            "gc": gc(rules),
        },
    )


def loads_amid_retention_and_gc(rules: Rules) -> Scenario:
    return Scenario(
        "a load while the job of 100 and 200 goes on and keeps one step, and gc",
        root({1: None, 2: (1, 100)}, [(1, 100), (1, 200), (2, 110)]),
        {
            "job": zombie(rules, "job", 2, (120,), lineage=old((1, 100), (2, 110)), keep=1),
            "load": loads(rules, "load"),
            "gc": gc(rules),
        },
    )


def second_thoughts(rules: Rules) -> Scenario:
    return Scenario(
        "a job whose second claim has no answer",
        root({1: None}, [(1, 100)]),
        {"job": second_thought(rules, "job", 1, (1, 100), 300), "other": job(rules, "other", (200,))},
        faults=("lost", "ghost", "echo"),
        fragile=("record", "term"),
        budget=1,
    )


def second_try(rules: Rules) -> Scenario:
    return Scenario(
        "a job that tries a failed step again, and another job",
        root({1: None}, [(1, 100)]),
        {"job": job(rules, "job", (400,), tries=2), "other": job(rules, "other", (300,))},
        faults=("lost", "ghost", "echo"),
        fragile=("record", "term"),
        budget=1,
    )


def lost_writes(rules: Rules) -> Scenario:
    return Scenario(
        "a data file that its writer believes in and nobody else sees",
        root({1: None}, [(1, 100)]),
        {"job": job(rules, "job", (200, 300), tries=2)},
        faults=("dropped",),
        fragile=("data",),
        budget=2,
    )


def first_jobs(rules: Rules) -> Scenario:
    return Scenario(
        "two first jobs on an empty root",
        {},
        {"one": job(rules, "one", (100,)), "two": job(rules, "two", (100,))},
        faults=("lost", "ghost", "echo"),
        fragile=("record", "term"),
        budget=1,
    )


ALL: list[Callable[[Rules], Scenario]] = [
    zombie_restart_and_gc,
    rollback_zombie_and_gc,
    rollback_and_zombie,
    fresh_start_over_an_old_run,
    two_jobs_and_a_zombie,
    two_zombies_job_and_gc,
    fresh_start_amid_a_look,
    fresh_start_job_and_gc,
    retention,
    retention_amid_a_takeover,
    retention_amid_a_rollback,
    loads_amid_retention_and_gc,
    second_thoughts,
    second_try,
    lost_writes,
    first_jobs,
]
