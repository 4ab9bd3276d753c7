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
    "terms": scenarios.zombie_restart_and_gc,
    "claim_put_if_absent": scenarios.two_jobs_and_a_zombie,
    "lost_claim_read_back": scenarios.two_jobs_and_a_zombie,
    "each_claim_has_its_id": scenarios.second_try,
    "no_way_back_from_a_claim": scenarios.second_thoughts,
    "plan_of_own_term": scenarios.zombie_restart_and_gc,
    "files_checked": scenarios.lost_writes,
    "record_last": scenarios.zombie_restart_and_gc,
    "next_term_checked_after_data": scenarios.fresh_start_job_and_gc,
    "record_put_if_absent": scenarios.zombie_restart_and_gc,
    "lost_record_read_back": scenarios.zombie_restart_and_gc,
    "tombstone_honoured": scenarios.zombie_restart_and_gc,
    "failed_attempt_kept": scenarios.zombie_restart_and_gc,
    "records_listed_first": scenarios.two_jobs_and_a_zombie,
    "missing_parent_looked_for": scenarios.fresh_start_amid_a_look,
    "claim_counts_at_once": scenarios.rollback_and_zombie,
    "fresh_claim_hides_nothing": scenarios.fresh_start_over_an_old_run,
    "claim_of_a_deleted_step_hides_nothing": scenarios.retention,
    "highest_term_wins": scenarios.rollback_and_zombie,
    "parents_cut_at_resume": scenarios.rollback_and_zombie,
    "missing_object_looked_into": scenarios.loads_amid_retention_and_gc,
    "retention_after_commit": scenarios.retention,
    "retention_keeps_the_newest": scenarios.retention,
    "retention_of_the_newest_term_only": scenarios.retention,
    "deletion_marked_first": scenarios.retention,
    "gc_older_terms_only": scenarios.zombie_restart_and_gc,
    "gc_tombstones": scenarios.zombie_restart_and_gc,
    "gc_stops_in_doubt": scenarios.fresh_start_job_and_gc,
    "gc_keeps_what_a_fresh_start_hides": scenarios.fresh_start_job_and_gc,
    "gc_waits_for_a_first_record": scenarios.retention_amid_a_rollback,
    "gc_keeps_tombstones": scenarios.zombie_restart_and_gc,
    "gc_keeps_named_plans": scenarios.zombie_restart_and_gc,
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
    assert {("acknowledges", name) for name in make(RIGHT).actors if name not in ("gc", "load")} <= told
    assert ("load" in make(RIGHT).actors) == (("loads", "load") in told)


@pytest.mark.parametrize("rule", sorted(NEEDED_BY))
def test_each_rule_is_needed(rule: str) -> None:
    """commit P20, P21, P23, P24, P25, P26, P27"""
    with pytest.raises(Violation):
        explored(NEEDED_BY[rule], replace(RIGHT, **{rule: False}))


def test_every_rule_has_a_scenario_that_needs_it() -> None:
    assert {field.name for field in fields(Rules)} == NEEDED_BY.keys()


def test_once_300_is_gone_back_to_500_is_never_newest_again() -> None:
    """TRAPS 29, and commit P16: from the claim on, whoever stops where and whatever the old job still commits."""

    def check(before: Store, after: Store, notes: frozenset[Note], new: tuple[Note, ...]) -> str | None:
        terms = dict(claims(after))
        latest = newest(RIGHT, committed(after), terms)
        claimed.add(2 in terms)
        return f"{latest} is newest" if 2 in terms and (latest is None or latest.step not in (300, 310, 320)) else None

    claimed: set[bool] = set()
    Explorer(scenarios.rollback_and_zombie(RIGHT), check).run()
    assert claimed == {True, False}
