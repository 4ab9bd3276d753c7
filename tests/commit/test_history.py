"""Which steps a root shows: against a definition by following each step to the one before it, and what is damage."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dscheck.commit import StepRef, read_history
from dscheck.errors import CheckpointNotFoundError, CorruptCheckpointError
from dscheck.manifest.keys import deletion_key, record_key, term_key
from dscheck.manifest.record import Deletion, Record, Tombstone
from dscheck.storage import LocalStorage, MemoryStorage
from dscheck.testing.faults import Faulty, Operation, before
from tests.commit.jobs import Job, a_record, a_term


@dataclass
class World:
    """A root as legal jobs leave it, and what each of them knew: terms by number, records, tombstones and deletions."""

    parents: list[tuple[int, int] | None] = field(default_factory=list)
    records: set[tuple[int, int]] = field(default_factory=set)
    dead: set[tuple[int, int]] = field(default_factory=set)
    deleted: set[tuple[int, int]] = field(default_factory=set)

    def head(self) -> int:
        """The last term that has a record, or names a parent that is there; 0 for none."""
        having = {n for n, parent in enumerate(self.parents, 1) if parent in self.records}
        return max(having | {term for term, _ in self.records}, default=0)

    def newest(self) -> tuple[int, int] | None:
        """The last record of that term; else its parent."""
        number = self.head()
        own = [name for name in self.records if name[0] == number]
        return max(own, default=None) if own or not number else self.parents[number - 1]

    def before(self, term: int, step: int) -> tuple[int, int] | None:
        """The committed step that (term, step) continues from: the last one of its term, else of its parent's side."""
        earlier = [(t, s) for t, s in self.records if t == term and s < step]
        if earlier:
            return max(earlier)
        parent = self.parents[term - 1]
        if parent is None or parent in self.records:
            return parent
        return self.before(*parent)

    def history(self) -> list[tuple[int, int]]:
        found, at = [], self.newest()
        while at is not None:
            found.append(at)
            at = self.before(*at)
        return found[::-1]

    def last_tried(self, term: int) -> int:
        steps = [s for t, s in self.records | self.dead | self.deleted if t == term]
        parent = self.parents[term - 1]
        return max([*steps, parent[1] if parent else 0])

    def storage(self) -> MemoryStorage:
        root = MemoryStorage()
        for number, parent in enumerate(self.parents, 1):
            root.put_if_absent(term_key(number), a_term(number, parent).encode())
        for term, step in self.records:
            root.put_if_absent(record_key(step, term), a_record(step, term, f"id-{term}").encode())
        for term, step in self.dead:
            root.put_if_absent(record_key(step, term), Tombstone(step, term, "gc", 1.0).encode())
        for term, step in self.deleted:
            root.put_if_absent(deletion_key(step, term), Deletion(step, term, "its id", "rm", 1.0).encode())
            if step % 2:  # a late copy of the request that created it
                root.put_if_absent(record_key(step, term), a_record(step, term, f"id-{term}").encode())
        return root


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Claims from any step of the live history of that moment, or from nothing, and commits of any job, old ones too.

    Each step of a term exceeds those before it; gc takes the name of attempts that failed, in older terms; any step
    may be deleted.
    """
    world = World()
    for _ in range(draw(st.integers(0, 14))):
        act = draw(st.sampled_from(["claim", "commit", "commit", "commit", "fail", "delete"]))
        if act == "claim" or not world.parents:
            world.parents.append(draw(st.sampled_from([None, *world.history(), world.newest(), world.newest()])))
            continue
        if act == "delete":
            if world.records:
                world.deleted.add(name := draw(st.sampled_from(sorted(world.records))))
                world.records.discard(name)
            continue
        term = draw(st.integers(max(1, len(world.parents) - 2), len(world.parents)))
        step = world.last_tried(term) + draw(st.integers(1, 3))
        if act == "commit":
            world.records.add((term, step))
        elif term < len(world.parents):
            world.dead.add((term, step))
    return world


@given(worlds())
def test_the_live_history_is_what_following_each_step_back_gives(world: World) -> None:
    """commit P16, P17, P18, P22: newest, visible and abandoned, over random histories."""
    history = read_history(world.storage())
    live = [StepRef(step, term) for term, step in world.history()]
    assert history.newest == (live[-1] if live else None)
    assert history.visible == tuple(live)
    assert history.abandoned == tuple(sorted(StepRef(s, t) for t, s in world.records if StepRef(s, t) not in live))
    assert history.newest_term == len(world.parents)
    for ref in live:
        record = history.resolve(ref.step)
        assert record is not None
        assert (record.step, record.term) == (ref.step, ref.term)
    numbers = {ref.step for ref in live}
    for step in {step for _, step in world.records | world.dead | world.deleted} - numbers:
        with pytest.raises(CheckpointNotFoundError):
            read_history(world.storage()).resolve(step)


@given(worlds())
def test_one_listing_and_one_read_find_the_newest(world: World) -> None:
    """commit P16: beyond the tombstones above it, and the claims down to the first that has a record or a parent."""
    root = Faulty(world.storage())
    newest = read_history(root).newest
    looks = 1 + any(world.parents[world.head() :])  # a parent that is gone might only be younger than the listing
    assert (root.count("list", "records/"), root.count("list", "terms/")) == (looks, looks)
    claims = len(world.parents) - world.head()
    without_record = newest is not None and newest.term != world.head()
    assert root.count("read", "terms/*") == claims + without_record
    above = [name for name in world.dead if name > ((newest.term, newest.step) if newest else (0, 0))]
    assert root.count("read", "records/*") <= looks * (len(above) + bool(newest))


@given(worlds(), st.integers(0, 9))
def test_a_claim_makes_the_step_that_it_names_the_newest(world: World, which: int) -> None:
    """commit P16, P17: at once, whatever else is there; a claim without a parent changes nothing (C3)."""
    was = read_history(world.storage())
    line = [None, *world.history()]
    parent = line[which % len(line)]
    world.parents.append(parent)
    now = read_history(world.storage())
    if parent is None:
        assert (now.newest, now.visible, now.abandoned) == (was.newest, was.visible, was.abandoned)
    else:
        assert now.newest == StepRef(parent[1], parent[0])
        assert now.visible == was.visible[: which % len(line)]
    assert {*now.visible, *now.abandoned} == {*was.visible, *was.abandoned}


@given(worlds())
def test_a_record_of_an_older_term_than_the_one_that_counts_changes_nothing(world: World) -> None:
    """commit P16, P18"""
    was = read_history(world.storage())
    counts = max([number for number, parent in enumerate(world.parents, 1) if parent in world.records], default=0)
    for term in range(1, counts):
        step = world.last_tried(term) + 1
        world.records.add((term, step))
        now = read_history(world.storage())
        assert (now.newest, now.visible) == (was.newest, was.visible)
        assert StepRef(step, term) in now.abandoned


def root_of(*jobs: tuple[int | None, list[int]]) -> MemoryStorage:
    """A root that these jobs left, each continuing a step (0: from nothing) and saving some."""
    root = MemoryStorage()
    for resumed, steps in jobs:
        job = Job.start(root, step=resumed or None, fresh=resumed == 0)
        for step in steps:
            job.save(step)
    return root


def test_a_rollback_takes_effect_with_its_claim() -> None:
    """commit P16, P17, and TRAPS 29: 300, then 310, and never 500 again."""
    root = root_of((0, [300, 400, 500]))
    job = Job.start(root, step=300)
    assert read_history(root).newest == StepRef(300, 1)
    record = job.prepare(310)
    assert read_history(root).newest == StepRef(300, 1)
    root.put_if_absent("records/310-2.json", record.encode())
    history = read_history(root)
    assert history.newest == StepRef(310, 2)
    assert [ref.step for ref in history.visible] == [300, 310]
    assert [ref.step for ref in history.abandoned] == [400, 500]


def test_a_fresh_start_takes_effect_with_its_first_record() -> None:
    """commit P16: however many of them crash before."""
    root = root_of((0, [300]), (0, []), (0, []))
    job = Job.start(root, fresh=True)
    assert read_history(root).newest == StepRef(300, 1)
    job.save(7)
    history = read_history(root)
    assert history.visible == (StepRef(7, 4),)
    assert history.run == history.claim(1).id


def test_a_parent_that_is_gone_leaves_what_is_below_it() -> None:
    """commit P14, P17: one look more, and no error."""
    root = root_of((0, [100, 200, 300]), (300, []))
    root.delete("records/300-1.json")
    storage = Faulty(root)
    assert read_history(storage).newest == StepRef(200, 1)
    assert storage.count("list", "records/") == 2
    root.put_if_absent("records/300-1.json", Tombstone(300, 1, "gc", 1.0).encode())
    assert read_history(root).newest == StepRef(200, 1)


def test_a_claim_whose_parent_is_younger_than_the_listing_makes_the_look_start_again() -> None:
    """commit P14: a fresh start commits, and a job continues it, between the two listings: 10 is newest."""
    root = root_of((0, [300]), (0, []))
    fresh = read_history(root).claim(2)

    def meanwhile(operation: Operation) -> None:
        Job(root, fresh).save(10)
        Job.start(root)

    storage = Faulty(root, before(meanwhile, "list", "terms/"))
    assert read_history(storage).newest == StepRef(10, 2)


def test_an_abandoned_step_is_refused_with_the_term_that_holds_it() -> None:
    """commit P18"""
    root = root_of((0, [300, 400, 500]), (300, [310]))
    with pytest.raises(CheckpointNotFoundError, match=r"step 400 was committed by term 1.*abandoned.*300, 310"):
        read_history(root).resolve(400)


def test_a_step_that_nobody_holds_is_refused_with_the_nearest_ones() -> None:
    """commit P18"""
    root = root_of((0, [100, 200, 300, 400, 500, 600, 700]))
    with pytest.raises(
        CheckpointNotFoundError, match=r"no step 350; committed are \.\.\., 200, 300, 400, 500, \.\.\., 7"
    ):
        read_history(root).resolve(350)
    with pytest.raises(CheckpointNotFoundError, match=r"committed are 100, 200, 300, 400, \.\.\., 700"):
        read_history(root).resolve(5)
    with pytest.raises(CheckpointNotFoundError, match=r"committed are \.\.\., 600, 700$"):
        read_history(root).resolve(999)
    with pytest.raises(CheckpointNotFoundError, match="committed are no steps"):
        read_history(MemoryStorage()).resolve(1)


def test_an_empty_root_has_no_newest_step() -> None:
    """commit P16"""
    history = read_history(MemoryStorage())
    assert (history.newest, history.resolve(None), history.run, history.newest_term) == (None, None, None, 0)


def test_records_are_listed_before_terms() -> None:
    """commit P14: a job that claims and commits between the two listings makes no damage."""
    root = root_of((0, [100]))

    def other(operation: Operation) -> None:
        Job.start(root).save(200)

    storage = Faulty(root, before(other, "list", "terms/"))
    history = read_history(storage)
    assert (history.newest, history.newest_term) == (StepRef(100, 1), 2)
    storage = Faulty(root, before(lambda op: Job.start(root).save(300), "list", "records/"))
    assert read_history(storage).newest == StepRef(300, 3)


def test_a_newest_record_that_vanishes_makes_the_look_start_again() -> None:
    """commit P15: after a rollback gc removes 500 while this one is about to read it; 400 must not be taken for it."""
    root = root_of((0, [300, 400, 500]))

    def roll_back(operation: Operation) -> None:
        Job.start(root, step=300).save(310)
        root.delete("records/500-1.json")

    storage = Faulty(root, before(roll_back, "read", "records/500-1.json"))
    assert read_history(storage).newest == StepRef(310, 2)


def test_records_that_always_vanish_are_an_error_in_the_end() -> None:
    """commit P15, and C7: no look without an end."""
    root = root_of((0, [300]))
    text = root.read("records/300-1.json")
    storage = Faulty(
        root,
        before(lambda op: root.delete(op.key), "read", "records/*", times=None),
        before(lambda op: root.put_if_absent("records/300-1.json", text), "list", "records/", times=None),
    )
    with pytest.raises(CheckpointNotFoundError, match="deletes steps"):
        read_history(storage)


def test_a_step_asked_for_by_number_that_vanishes_is_named() -> None:
    """commit P15"""
    root = root_of((0, [300, 400]))
    history = read_history(root)
    root.delete("records/300-1.json")
    with pytest.raises(CheckpointNotFoundError, match="step 300 of term 1 vanished"):
        history.resolve(300)


def test_a_tombstone_is_no_step() -> None:
    """commit P22: neither newest, nor visible, nor abandoned, nor loaded."""
    root = root_of((0, [300]), (None, [400]))
    root.put_if_absent("records/350-1.json", Tombstone(350, 1, "gc", 1.0).encode())
    history = read_history(root)
    assert [*history.visible, *history.abandoned] == [StepRef(300, 1), StepRef(400, 2)]
    with pytest.raises(CheckpointNotFoundError, match="no step 350"):
        history.resolve(350)
    with pytest.raises(CheckpointNotFoundError, match="never committed"):
        history.record(StepRef(350, 1))


@pytest.mark.parametrize(
    ("made", "lost", "named"),
    [
        ("records/300-1.json.bak", None, r"records/300-1\.json\.bak"),
        ("records/0300-1.json", None, r"records/0300-1\.json"),
        ("records/old/300-1.json", None, r"records/old"),
        ("terms/one.json", None, r"terms/one\.json"),
        ("terms/0.json", None, r"terms/0\.json"),
        ("terms/4.json", None, r"terms/3\.json is not"),
        ("records/400-3.json", None, r"records/400-3\.json.*terms/3\.json is not"),
        (None, "terms/1.json", r"terms/2\.json is there, terms/1\.json is not"),
        (None, "terms/2.json", r"records/310-2\.json.*terms/2\.json is not"),
    ],
)
def test_what_does_not_belong_there_is_damage_and_not_nothing(made: str | None, lost: str | None, named: str) -> None:
    """commit P1, P19: C15."""
    root = root_of((0, [300]), (None, [310]))
    if made:
        root.put_if_absent(made, b"?")
    if lost:
        root.delete(lost)
    with pytest.raises(CorruptCheckpointError, match=named):
        read_history(root)


@pytest.mark.parametrize("folder", ["steps", "plans"])
def test_data_without_any_term_is_damage(folder: str) -> None:
    """commit P19"""
    root = root_of((0, [300]))
    for entry in list(root.list("")):
        if not entry.key.startswith(folder):
            root.delete(entry.key)
    with pytest.raises(CorruptCheckpointError, match=f"there is {folder}/ and no terms/"):
        read_history(root)


def test_a_first_claim_amid_the_listings_is_no_damage() -> None:
    """commit P14, P19"""
    root = MemoryStorage()
    storage = Faulty(root, before(lambda op: Job.start(root).prepare(1), "list", "steps/"))
    assert read_history(storage).newest is None


def test_names_that_begin_with_a_dot_are_nothing(tmp_path: Path) -> None:
    """commit P19: temporary files, and what network file systems leave."""
    Job.start(LocalStorage(tmp_path)).save(300)
    (tmp_path / "records" / ".nfs0001").write_text("?")
    (tmp_path / "terms" / ".2.json").write_text("?")
    assert read_history(LocalStorage(tmp_path)).newest == StepRef(300, 1)


@pytest.mark.parametrize("key", ["records/310-2.json", "terms/2.json"])
def test_a_damaged_record_or_term_is_an_error(key: str) -> None:
    """commit P19: never a step that is not there."""
    root = root_of((0, [300, 305]), (300, [310]))
    text = root.read(key)
    root.delete(key)
    root.put_if_absent(key, text.replace(b'"kind"', b'"KIND"'))
    with pytest.raises(CorruptCheckpointError, match=key.replace(".", r"\.")):
        assert read_history(root).visible


def test_a_record_of_another_root_is_damage() -> None:
    """commit P19: its term has the right number and another id."""
    root, other = root_of((0, [300])), root_of((0, [400]))
    root.put_if_absent("records/400-1.json", other.read("records/400-1.json"))
    with pytest.raises(CorruptCheckpointError, match="two roots were mixed"):
        read_history(root).resolve(None)
    assert isinstance(read_history(root).resolve(300), Record)


def test_a_term_that_continues_from_itself_is_damage() -> None:
    """commit P19"""
    root = MemoryStorage()
    root.put_if_absent("terms/1.json", a_term(1, (1, 300)).encode())
    root.put_if_absent("records/400-1.json", a_record(400, 1, "id-1").encode())
    with pytest.raises(CorruptCheckpointError, match="parent"):
        assert read_history(root).visible
