"""The commit protocol of docs/commit.md as actors over one storage, with a switch for all that might be left out.

Keys: ("term", n) -> Claim, ("plan", term, name), ("data", term, step), ("files", term, step), ("record", term, step)
-> Committed or TOMBSTONE, and ("deleted", term, step), beside which a record counts for nothing. One data object stands
for those of all ranks. A listing with the reads that follow it is one step here: terms are never deleted, and a record
that is gone when it is read makes the reader list again.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from tests.commit.explorer import ERROR, Actor, Delete, Get, Key, Look, Note, Put, Step, Store, actor

Run = Generator[Step | Note, Any, Any]
TOMBSTONE = "tombstone"


class Claim(NamedTuple):
    """`parent`: the (term, step) that its owner continues from. `id`: the number of the owner's try."""

    owner: str
    parent: tuple[int, int] | None
    id: int = 0


class Committed(NamedTuple):
    term: int
    step: int
    owner: str
    plan: Key


@dataclass(frozen=True)
class Rules:
    """The protocol when all are True; each False is one mutation that the checker must catch."""

    # Terms
    terms: bool = True
    claim_put_if_absent: bool = True
    lost_claim_read_back: bool = True
    each_claim_has_its_id: bool = True
    no_way_back_from_a_claim: bool = True
    # A step
    plan_of_own_term: bool = True
    files_checked: bool = True
    record_last: bool = True
    next_term_checked_after_data: bool = True
    record_put_if_absent: bool = True
    lost_record_read_back: bool = True
    tombstone_honoured: bool = True
    failed_attempt_kept: bool = True
    # The history
    records_listed_first: bool = True
    missing_parent_looked_for: bool = True
    claim_counts_at_once: bool = True
    fresh_claim_hides_nothing: bool = True
    claim_of_a_deleted_step_hides_nothing: bool = True
    highest_term_wins: bool = True
    parents_cut_at_resume: bool = True
    missing_object_looked_into: bool = True
    # Deleting what was committed
    retention_after_commit: bool = True
    retention_keeps_the_newest: bool = True
    retention_of_the_newest_term_only: bool = True
    deletion_marked_first: bool = True
    # gc
    gc_older_terms_only: bool = True
    gc_tombstones: bool = True
    gc_stops_in_doubt: bool = True
    gc_keeps_what_a_fresh_start_hides: bool = True
    gc_waits_for_a_first_record: bool = True
    gc_keeps_tombstones: bool = True
    gc_keeps_named_plans: bool = True


RIGHT = Rules()


def committed(store: Store) -> frozenset[Committed]:
    found = (value for key, value in store.items() if key[0] == "record" and value != TOMBSTONE)
    return frozenset(record for record in found if ("deleted", record.term, record.step) not in store)


def record_names(store: Store) -> frozenset[tuple[int, int]]:
    return frozenset(key[1:] for key in store if key[0] == "record")


def claims(store: Store) -> frozenset[tuple[int, Claim]]:
    return frozenset((key[1], value) for key, value in store.items() if key[0] == "term")


def attempts(store: Store) -> frozenset[tuple[int, int]]:
    return frozenset(key[1:] for key in store if key[0] in ("data", "files"))


def left_behind(store: Store) -> frozenset[tuple[int, int]]:
    """Deleted steps of which something is still there."""
    marks = {key[1:] for key in store if key[0] == "deleted"}
    return frozenset(name for name in marks if any((kind, *name) in store for kind in ("record", "data", "files")))


def plans(store: Store) -> frozenset[Key]:
    return frozenset(key for key in store if key[0] == "plan")


def ancestry(terms: dict[int, Claim], top: int | None, cut: bool = True) -> dict[int, float]:
    """Of each term on the way down from `top`, up to which step it counts."""
    limits: dict[int, float] = {}
    limit = float("inf")
    while top is not None and top in terms:
        limits[top] = limit
        parent = terms[top].parent
        if parent is None:
            break
        top, limit = parent if cut else (parent[0], limit)
    return limits


def visible_from(
    top: int | None, records: Iterable[Committed], terms: dict[int, Claim], cut: bool = True
) -> frozenset[Committed]:
    limits = ancestry(terms, top, cut)
    return frozenset(r for r in records if r.term in limits and r.step <= limits[r.term])


def head(rules: Rules, records: frozenset[Committed], terms: dict[int, Claim]) -> int | None:
    """The term whose ancestry is the live history: the highest one that has a record, or whose parent is there."""
    names = {(r.term, r.step) for r in records}
    with_record = {term for term, _ in names}
    for number in sorted(terms, reverse=True):
        parent = terms[number].parent
        counts = rules.claim_counts_at_once if parent else not rules.fresh_claim_hides_nothing
        if parent not in names and parent is not None and rules.claim_of_a_deleted_step_hides_nothing:
            counts = False
        if counts or number in with_record:
            return number
    return None


def visible(rules: Rules, records: frozenset[Committed], terms: dict[int, Claim]) -> frozenset[Committed]:
    if not rules.highest_term_wins:
        return records
    return visible_from(head(rules, records, terms), records, terms, rules.parents_cut_at_resume)


def newest(rules: Rules, records: frozenset[Committed], terms: dict[int, Claim]) -> Committed | None:
    return max(visible(rules, records, terms), key=lambda r: (r.step, r.term), default=None)


def job(
    rules: Rules,
    me: str,
    steps: tuple[int, ...],
    *,
    resume: int | str = "newest",
    tries: int = 1,
    keep: int | None = None,
) -> Actor:
    """Load ("newest", a step, or "fresh" for none), claim a term, save `steps`; a failed one is tried in a new term."""

    def run() -> Run:
        done: set[int] = set()
        for number in range(tries):
            term, lineage = yield from load_and_claim(rules, me, resume, number)
            base = max((r.step for r in lineage), default=0)
            left = [step for step in steps if term is not None and step > base and step not in done]
            for step in left:
                if (yield from save_and_retain(rules, me, term, step, lineage, keep)) != "acked":
                    break
                done.add(step)
            if done.issuperset(left) and term is not None:
                return

    return actor(run)


def second_thought(rules: Rules, me: str, term: int, parent: tuple[int, int], step: int) -> Actor:
    """The owner of `term`, a save of which has failed: it claims the next one, and goes on only there."""

    def run() -> Run:
        claimed = yield from claim(rules, me, term + 1, parent, 1)
        if claimed is None and rules.no_way_back_from_a_claim:
            return
        yield from save(rules, me, claimed or term, step)

    return actor(run)


def zombie(
    rules: Rules,
    me: str,
    term: int,
    steps: tuple[int, ...],
    *,
    lineage: Iterable[Committed] = (),
    keep: int | None = None,
) -> Actor:
    """A job that claimed its term long ago and does not know that another one was started."""

    def run() -> Run:
        known = list(lineage)
        for step in steps:
            if (yield from save_and_retain(rules, me, term, step, known, keep)) != "acked":
                return

    return actor(run)


def loads(rules: Rules, me: str, tries: int = 2) -> Actor:
    """Read the newest step. A missing object makes it start again if the step was deleted, and is damage if not."""

    def run() -> Run:
        for _ in range(tries):
            records, terms = yield from look(rules, 0)
            found = newest(rules, records, terms)
            if found is None:
                yield Note("finds newest", me, (max(terms, default=0), found))
                return
            name = found.term, found.step
            parts = found.plan, ("files", *name), ("data", *name)
            whole = True
            for part in parts:
                whole = whole and (yield Get(part)) is not None
            if whole:
                yield Note("loads", me, found)
                return
            gone = (yield Get(("deleted", *name))) or not (yield Get(("record", *name)))
            if not (gone and rules.missing_object_looked_into):
                yield Note("finds damage", me, found)
                return

    return actor(run)


def load_and_claim(rules: Rules, me: str, resume: int | str, number: int) -> Run:
    """The claimed term, or None, and the live history up to the step that it continues."""
    records, terms = yield from look(rules, 0)
    if any(r.term not in terms for r in records):
        yield Note("finds damage", me, None)
        return None, []
    base = newest(rules, records, terms)
    if isinstance(resume, int):
        base = next((r for r in visible(rules, records, terms) if r.step == resume), None)
        if base is None:
            return None, []
    else:
        yield Note("finds newest", me, (max(terms, default=0), base))
    if resume == "fresh":
        base = None
    lineage = sorted(r for r in visible(rules, records, terms) if base and r.step <= base.step)
    if not rules.terms:
        return max(terms, default=1), lineage
    parent = (base.term, base.step) if base else None
    term = yield from claim(rules, me, max(terms, default=0) + 1, parent, number)
    return term, lineage


def look(rules: Rules, known: int) -> Run:
    """The records and the terms. `known`: the highest term that was seen before."""
    if rules.records_listed_first:
        records = yield Look(committed)
        terms = dict((yield Look(claims)))
    else:
        terms = dict((yield Look(claims)))
        records = yield Look(committed)
    passed_over = (n for n in terms if n > max(known, head(rules, records, terms) or 0) and terms[n].parent)
    if rules.missing_parent_looked_for and any(passed_over):
        return (yield from look(rules, max(terms)))
    return records, terms


def claim(rules: Rules, me: str, number: int, parent: tuple[int, int] | None, tried: int) -> Run:
    mine = Claim(me, parent, tried)
    won = yield Put(("term", number), mine, replaces=not rules.claim_put_if_absent)
    if won is not True:
        found = (yield Get(("term", number))) if rules.lost_claim_read_back or won is False else mine
        ours = found == mine if rules.each_claim_has_its_id else found is not None and found.owner == me
        if not ours:
            return None
    yield Note("owns", me, (number, mine))
    return number


def save_and_retain(rules: Rules, me: str, term: int, step: int, lineage: list[Committed], keep: int | None) -> Run:
    """Save `step`; with `keep`, once it is committed, delete all steps of `lineage` but so many."""
    record = committed_by(rules, me, term, step)
    if keep is not None and not rules.retention_after_commit:
        yield from retain(rules, me, term, [*lineage, record], keep)
    outcome = yield from save(rules, me, term, step)
    if outcome == "acked":
        lineage.append(record)
        if keep is not None:
            yield from retain(rules, me, term, lineage, keep)
    return outcome


def retain(rules: Rules, me: str, term: int, lineage: list[Committed], keep: int) -> Run:
    """Delete all but the last `keep` steps of the job's own lineage, as long as its term is the newest."""
    for record in sorted(lineage, key=lambda r: (r.step, r.term))[
        : -keep if rules.retention_keeps_the_newest else None
    ]:
        if rules.retention_of_the_newest_term_only and (yield Get(("term", term + 1))):
            return
        yield Note("drops", me, (term, record))
        if not (yield from drop(rules, (record.term, record.step))):
            return
        lineage.remove(record)


def committed_by(rules: Rules, me: str, term: int, step: int) -> Committed:
    return Committed(term, step, me, ("plan", term if rules.plan_of_own_term else 0, "p"))


def save(rules: Rules, me: str, term: int, step: int) -> Run:
    record = committed_by(rules, me, term, step)
    yield Put(record.plan, "p")
    if not rules.next_term_checked_after_data and (yield Get(("term", term + 1))):
        return "superseded"
    outcome = None
    if not rules.record_last:
        outcome = yield from publish(rules, me, record)
    if (yield from write(rules, me, term, step)) != "written":
        return "failed"
    return outcome or (yield from publish(rules, me, record))


def write(rules: Rules, me: str, term: int, step: int) -> Run:
    overwrites = not rules.terms
    if not (yield Put(("data", term, step), me, replaces=overwrites)):
        return "failed"
    if rules.files_checked and (yield Get(("data", term, step))) != me:
        return "failed"
    if not (yield Put(("files", term, step), me, replaces=overwrites)):
        return "failed"
    return "written"


def publish(rules: Rules, me: str, record: Committed) -> Run:
    key = ("record", record.term, record.step)
    if rules.next_term_checked_after_data and (yield Get(("term", record.term + 1))):
        return "superseded"
    done = yield Put(key, record, replaces=not rules.record_put_if_absent)
    if done is not True:
        found = (yield Get(key)) if done is False or rules.lost_record_read_back else None
        if found == TOMBSTONE and not rules.tombstone_honoured:
            yield Put(key, record, replaces=True)
            found = record
        if found != record:
            yield Note("gives up", me, record)
            if not rules.failed_attempt_kept:
                yield Delete(("data", record.term, record.step))
            return "failed"
    yield Note("acknowledges", me, record)
    return "acked"


def gc(rules: Rules, me: str = "gc") -> Actor:
    """Remove abandoned steps, attempts that never committed, and plans that no record names, of older terms only."""

    def run() -> Run:
        terms = dict((yield Look(claims)))
        top = max(terms, default=0)
        if not rules.gc_older_terms_only:
            top += 1
        tried = sorted(name for name in (yield Look(attempts)) if name[0] < top)
        dead = yield from bury(rules, tried, (yield Look(record_names)))
        if dead is None:
            return
        records = yield Look(committed)
        abandoned = sorted((r.term, r.step) for r in records - kept(rules, records, terms) if r.term < top)
        for name in abandoned:
            if not (yield from drop(rules, name)) and rules.gc_stops_in_doubt:
                return
        for name in dead:
            yield from drop_data(*name)
        for name in sorted((yield Look(left_behind))):
            yield from drop(rules, name)
        if not rules.gc_keeps_tombstones:
            for name in dead:
                yield Delete(("record", *name))
        named = {r.plan for r in records if (r.term, r.step) not in abandoned} if rules.gc_keeps_named_plans else set()
        for plan in sorted((yield Look(plans)) - named):
            if plan[1] < top:
                yield Delete(plan)

    return actor(run)


def bury(rules: Rules, tried: list[tuple[int, int]], named: frozenset[tuple[int, int]]) -> Run:
    """Win the record names of attempts that have none: those won can never be committed. None: one is still open."""
    dead = []
    for name in tried:
        if name in named:
            continue
        won = (yield Put(("record", *name), TOMBSTONE)) if rules.gc_tombstones else True
        if won == ERROR:
            found = yield Get(("record", *name))
            if found is None and rules.gc_stops_in_doubt:
                return None
            won = found == TOMBSTONE
        if won:
            dead.append(name)
    return dead


def kept(rules: Rules, records: frozenset[Committed], terms: dict[int, Claim]) -> frozenset[Committed]:
    """All that a job may have found that claims next, or that counts should the newest term's parent be deleted."""
    found: set[Committed] = set()
    for number in sorted(terms, reverse=True):
        found |= visible_from(number, records, terms)
        begun = any(r.term == number for r in records)
        if terms[number].parent is None:
            ends = begun and not rules.gc_keeps_what_a_fresh_start_hides
        else:
            ends = begun or not rules.gc_waits_for_a_first_record
        if ends:
            break
    return frozenset(found)


def drop(rules: Rules, name: tuple[int, int]) -> Run:
    """Delete a committed step; False when nobody can say whether it is deleted."""
    marked = (yield Put(("deleted", *name), "deleted")) if rules.deletion_marked_first else True
    if marked == ERROR and (yield Get(("deleted", *name))) is None:
        return False
    yield Delete(("record", *name))
    yield from drop_data(*name)
    return True


def drop_data(term: int, step: int) -> Run:
    yield Delete(("data", term, step))
    yield Delete(("files", term, step))
