"""The model holds in every state of every scenario, and each rule, left out, is missed in one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import pytest

from tests.commit import scenarios
from tests.commit.explorer import Explored, Explorer, Note, Scenario, Store, Violation
from tests.commit.model import RIGHT, Rules, claims, committed, newest
from tests.commit.safety import Safety

# A scenario that needs each rule, the one that notices its absence soonest.
NEEDED_BY: dict[str, Callable[[Rules], Scenario]] = {
    "terms": scenarios.two_jobs_and_a_zombie,
    "claim_put_if_absent": scenarios.first_jobs,
    "lost_claim_read_back": scenarios.first_jobs,
    "each_claim_has_its_id": scenarios.second_try,
    "look_after_claim": scenarios.zombie_restart_and_gc,
    "plan_of_own_term": scenarios.rollback_zombie_and_gc,
    "files_checked": scenarios.lost_writes,
    "record_last": scenarios.zombie_restart_and_gc,
    "next_term_checked_after_data": scenarios.fresh_start_over_an_old_run,
    "record_put_if_absent": scenarios.zombie_restart_and_gc,
    "lost_record_read_back": scenarios.zombie_restart_and_gc,
    "tombstone_honoured": scenarios.zombie_restart_and_gc,
    "next_term_checked_before_answer": scenarios.zombie_restart_and_gc,
    "failed_attempt_kept": scenarios.zombie_restart_and_gc,
    "records_listed_first": scenarios.first_jobs,
    "claim_alone_hides_nothing": scenarios.zombie_restart_and_gc,
    "highest_term_wins": scenarios.second_try,
    "parents_cut_at_resume": scenarios.two_zombies_job_and_gc,
    "gc_older_terms_only": scenarios.two_zombies_job_and_gc,
    "gc_tombstones": scenarios.zombie_restart_and_gc,
    "gc_stops_in_doubt": scenarios.fresh_start_over_an_old_run,
    "gc_keeps_what_newer_claims_continue": scenarios.two_zombies_job_and_gc,
    "gc_terms_listed_last": scenarios.two_zombies_job_and_gc,
    "gc_record_before_data": scenarios.two_zombies_job_and_gc,
    "gc_buries_deleted_records": scenarios.zombie_restart_and_gc,
    "gc_keeps_tombstones": scenarios.zombie_restart_and_gc,
    "gc_keeps_named_plans": scenarios.two_zombies_job_and_gc,
}


def explored(make: Callable[[Rules], Scenario], rules: Rules) -> Explored:
    scenario = make(rules)
    return Explorer(scenario, Safety(rules, scenario.store).check).run()


@pytest.mark.parametrize("make", scenarios.ALL)
def test_no_interleaving_breaks_a_promise(make: Callable[[Rules], Scenario]) -> None:
    """TRAPS 28."""
    found = explored(make, RIGHT)
    told = {(note.event, note.actor) for note in found.notes}
    # Each of them gets through in some run: otherwise the scenario would show nothing.
    assert {("acknowledges", name) for name in make(RIGHT).actors if name != "gc"} <= told


@pytest.mark.parametrize("rule", sorted(NEEDED_BY))
def test_each_rule_is_needed(rule: str) -> None:
    """commit P22, P23, P25, P26, P27: until there is a gc, only the model shows what these are for."""
    with pytest.raises(Violation):
        explored(NEEDED_BY[rule], replace(RIGHT, **{rule: False}))


def test_every_rule_has_a_scenario_that_needs_it() -> None:
    assert {field.name for field in fields(Rules)} == NEEDED_BY.keys()


def test_saving_310_after_a_load_of_300_never_makes_500_newest_again() -> None:
    """TRAPS 29: whoever stops where, the step that was gone back to is followed by 310, and by nothing older."""

    def check(before: Store, after: Store, notes: frozenset[Note], new: tuple[Note, ...]) -> str | None:
        records = committed(after)
        latest = newest(RIGHT, records, dict(claims(after)))
        rolled_back = any(record.step == 310 for record in records)
        return f"{latest} is newest" if rolled_back and (latest is None or latest.step not in (310, 320)) else None

    Explorer(scenarios.rollback_and_zombie(RIGHT), check).run()
