"""The claims of all ranks become one plan: who is believed, who writes, and who is refused by name."""

from __future__ import annotations

import json
import weakref
from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dscheck import StateError, sharded
from dscheck.commit import read_history
from dscheck.commit.contents import Contents
from dscheck.errors import IncompleteCoverError, LayoutError
from dscheck.layout.region import Region
from dscheck.manifest.dtypes import ITEMSIZE
from dscheck.manifest.plan import Plan
from dscheck.ranks.base import Ranks
from dscheck.save.claims import Claim, RankClaims, share_of, watch
from dscheck.save.merge import merge
from dscheck.save.rivals import Samples
from dscheck.state import FlatState, Proof, TensorLeaf
from tests.end_to_end.worlds import fresh, job, load, open_on

MIB = 1 << 20


def claim(name: str, shape: tuple[int, ...], *regions: Region, holders: tuple[int, ...], proof: str = "mesh") -> Claim:
    return Claim(name, "float32", shape, regions or (Region.whole(shape),), holders, proof)


def ranks_of(*claims: list[Claim]) -> list[RankClaims]:
    return [RankClaims.of("host", (("dp", rank),), rows) for rank, rows in enumerate(claims)]


def written_by(plan: Plan) -> Counter[int]:
    total: Counter[int] = Counter()
    for fragment in plan.fragments:
        total[fragment.writer] += fragment.nbytes
    return total


def test_claims_survive_their_message() -> None:
    rows = [
        claim("a", (4, 3), Region((0, 0), (2, 3)), holders=(0, 5)),
        claim("b", (), holders=(0,), proof="claim"),
        claim("c", (7,), Region((0,), (2,)), Region((4,), (4,)), Region((5,), (7,)), holders=(0, 5)),
        Claim("d", "int8", (0, 3), (), (1, 3, 5, 6, 8, 9, 10), "mesh", ("e", "\n")),
    ]
    claims = ranks_of(rows)[0]
    found = RankClaims.decode(claims.encode(), 11)
    assert found.encode() == claims.encode()
    assert (found.host, found.mesh, found.tensors) == (claims.host, claims.mesh, claims.tensors)
    assert [found.holders[at] for at in found.held_by] == [row.holders for row in rows]
    assert found.unproved.tolist() == [False, True, False, False]
    regions = [region for row in rows for region in row.regions]
    assert [found.boxes.region(at) for at in range(len(found.boxes))] == regions
    assert np.diff(found.first).tolist() == [1, 1, 3, 0]
    assert RankClaims.decode(claims.encode(), 11).tensors is found.tensors


def test_claims_that_do_not_fit_their_tensors_are_refused() -> None:
    whole = ranks_of([claim("a", (4, 3), holders=(0, 1)), claim("b", (), holders=(0,))])[0]
    own, tensors, columns = whole.encode().split(b"\n")
    with pytest.raises(LayoutError, match="1 ranks"):
        RankClaims.decode(whole.encode(), 1)
    for lines in ((own, b"[]", columns), (b'["h",[],[]]', tensors, columns)):
        with pytest.raises(LayoutError, match="claims of a rank"):
            RankClaims.decode(b"\n".join(lines), 2)
    swapped = json.dumps(json.loads(tensors)[::-1]).encode()
    with pytest.raises(LayoutError, match="order of their names"):
        RankClaims.decode(b"\n".join((own, swapped, columns)), 2)


@given(st.sets(st.integers(0, 60)))
def test_any_holder_set_survives_its_message(members: set[int]) -> None:
    row = claim("a", (), holders=tuple(sorted(members)))
    found = RankClaims.decode(ranks_of([row])[0].encode(), 61)
    assert found.holders == (row.holders,)
    assert found.holds(7).tolist() == [7 in members]


@pytest.mark.parametrize("ranks", [2, 3, 4, 7, 16])
def test_shown_replicas_are_written_once_and_evenly(ranks: int) -> None:
    """The worst rank writes at most 1.1 x the mean, over replicas of 1 MiB and more."""
    everyone = tuple(range(ranks))
    shapes = [(7, 1_000_003 // 7), (1024, 1024), (50_257, 64), (262_144,), (3, 5, 7, 4001), (1, 300_001)]
    rows = [claim(f"t{i}", shape, holders=everyone) for i, shape in enumerate(shapes)]
    plan = merge(ranks_of(*[rows] * ranks), 256 << 10).plan
    total = written_by(plan)
    assert sum(total.values()) == sum(row.nbytes for row in plan.tensors)
    assert max(total.values()) <= 1.1 * sum(total.values()) / ranks


def test_each_rank_computes_the_share_that_the_plan_gives_it() -> None:
    everyone = (0, 1, 2)
    rows = [claim("big", (700, 1000), holders=everyone), claim("small", (3,), holders=everyone)]
    plan = merge(ranks_of(rows, rows, rows), 4096).plan
    planned = defaultdict(list)
    for fragment in plan.fragments:
        planned[fragment.writer].append((plan.tensors[fragment.tensor].name, fragment.region))
    for rank in everyone:
        mine = [(row.name, box) for row in rows for box in share_of(rank, row, row.regions[0], {})]
        assert sorted(mine) == sorted(planned[rank])


def test_a_replica_that_lacks_a_tensor_leaves_it_to_those_that_have_it() -> None:
    """Absent on some replicas: the others hold it."""
    row = claim("state", (600, 1000), holders=(0, 1, 2))
    merged = merge(ranks_of([], [row], [row]), 4096)
    assert set(written_by(merged.plan)) == {1, 2}
    assert merged.exceptions == {("state", row.regions[0]): (1, 2)}
    assert merged.plan.holders == ((1, 2),)


def test_a_tensor_that_one_of_two_shards_lacks_is_refused() -> None:
    half = claim("state", (4,), Region((0,), (2,)), holders=(0,))
    with pytest.raises(IncompleteCoverError, match="'state'"):
        merge(ranks_of([half], []), 4096)


def test_one_region_claimed_without_proof_is_written_whole_by_one() -> None:
    rows = [[claim("x", (600, 1000), holders=(rank,), proof="claim")] for rank in range(3)]
    merged = merge(ranks_of(*rows), 4096)
    assert written_by(merged.plan) == {0: 600_000 * 4}
    assert merged.plan.holders == ((0, 1, 2),)
    assert merged.rivals.regions == [("x", Region.whole((600, 1000)))]


def test_two_meshes_that_claim_one_region_are_compared_and_one_of_them_writes() -> None:
    left, right = (claim("x", (600, 1000), holders=holders) for holders in ((0, 1), (2, 3)))
    merged = merge(ranks_of([left], [left], [right], [right]), 4096)
    assert set(written_by(merged.plan)) == {0, 1}
    assert merged.rivals.regions


def test_a_rank_that_only_loads_a_tensor_claims_nothing() -> None:
    """Buffers under DDP: the group's first rank is authoritative (TRAPS 5)."""
    row = claim("mean", (5,), holders=(0,), proof="first")
    merged = merge(ranks_of([row], [row]), 4096)
    assert merged.plan.holders == ((0,),)
    assert not merged.rivals.regions


def test_replicas_by_mesh_that_hold_other_regions_are_refused() -> None:
    one, other = (claim("x", (4,), Region((a,), (a + 2,)), holders=(0, 1)) for a in (0, 2))
    with pytest.raises(LayoutError, match="ranks 0 and 1 are replicas"):
        merge(ranks_of([one], [other]), 4096)


def test_an_alias_that_is_another_tensor_elsewhere_is_refused() -> None:
    tied = Claim("a", "float32", (2,), (Region((0,), (2,)),), (0,), "claim", ("b",))
    with pytest.raises(StateError, match="'b'"):
        merge(ranks_of([tied], [claim("b", (2,), holders=(1,))]), 4096)


def test_samples_that_differ_refuse_and_missing_ones_are_said() -> None:
    rows = [[claim("x", (4,), holders=(rank,), proof="claim")] for rank in range(2)]
    claims = ranks_of(*rows)
    rivals = merge(claims, 4096).rivals

    def of(*hashes: int | None) -> list[Samples]:
        known = [([], []) if value is None else ([0], [value]) for value in hashes]
        return [Samples(np.array(rows, np.int64), np.array(values, np.uint64)) for rows, values in known]

    assert rivals.agree(lambda: of(5, 5), "equal")
    assert not rivals.agree(lambda: of(5, None), "equal")
    with pytest.raises(StateError, match="ranks 0 and 1"):
        rivals.agree(lambda: of(5, 2**64 - 1), "equal")
    assert rivals.agree(lambda: of(5, 6), "first")


def test_in_steady_state_only_what_needs_comparing_is_sampled() -> None:
    rows = [claim("mesh", (4,), holders=(0,)), claim("plain", (4,), holders=(0,), proof="claim")]
    assert [name for name, _ in watch(0, 2, rows, None)] == ["mesh", "plain"]
    assert [name for name, _ in watch(0, 2, rows, set())] == ["plain"]
    assert [name for name, _ in watch(0, 2, rows, {("mesh", Region((0,), (4,)))})] == ["mesh", "plain"]


def test_the_coordinator_knows_what_each_rank_samples() -> None:
    rows = [
        claim("mesh", (4,), Region((0,), (1,)), Region((1,), (4,)), holders=(0,)),
        claim("other", (4,), holders=(1,)),
        claim("plain", (4,), holders=(0,), proof="claim"),
    ]
    claims, keys = ranks_of(rows)[0], [(row.name, region) for row in rows for region in row.regions]
    for contested in (None, [], [1], [0, 1], [3]):
        known = None if contested is None else {keys[row] for row in contested}
        expected = [keys.index(key) for key in watch(0, 2, rows, known)]
        assert claims.watched(0, None if contested is None else np.array(contested, np.int64)).tolist() == expected


def test_the_ranks_table_keeps_every_mesh_coordinate() -> None:
    plan = merge(ranks_of([claim("x", (4,), holders=(0,))], []), 4096).plan
    assert [(row.rank, row.host, row.mesh) for row in plan.ranks] == [
        (0, "host", (("dp", 0),)),
        (1, "host", (("dp", 1),)),
    ]


def test_every_itemsize_is_that_of_torch() -> None:
    for name, itemsize in ITEMSIZE.items():
        assert getattr(torch, name).itemsize == itemsize


def test_a_rank_made_writer_only_by_the_plan_captures_late_or_refuses(monkeypatch: Any) -> None:
    """The first save after a replica lost a tensor: its share falls to ranks that did not capture it."""
    from dscheck.state import LiveState

    full = torch.arange(2 * MIB // 4, dtype=torch.float32)
    plain = LiveState.flatten

    def flatten(self: LiveState) -> FlatState:
        """A tensor that all ranks hold by mesh, and that rank 0 has not got."""
        flat = plain(self)
        held = [
            (_by_mesh(leaf, self.rank) if leaf.name == "x" else leaf, local)
            for leaf, local in zip(flat.tensors, flat.locals, strict=True)
            if leaf.name != "x" or self.rank
        ]
        return replace(flat, tensors=[leaf for leaf, _ in held], locals=[local for _, local in held])

    monkeypatch.setattr(LiveState, "flatten", flatten)
    root = fresh()

    def run(ranks: Ranks) -> list[int]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        state = {"x": full.clone(), "y": torch.zeros(1)}
        OWNER[ranks.rank] = optimizer
        with open_on(ranks, root, state) as ckpt:
            first = ckpt.save(1)
            first.wait()
            second = ckpt.save(2)
            second.wait()
            return [first.stats.bytes, second.stats.bytes]

    moved = job(3, run)
    assert sum(sizes[1] for sizes in moved) == full.nbytes + 4
    monkeypatch.undo()
    state = {"x": torch.zeros_like(full), "y": torch.ones(1)}
    load(root, [state], step=1)
    assert torch.equal(state["x"], full)
    history = read_history(root)
    record = history.resolve(1)
    assert record is not None
    assert {f.writer for f in Contents.open(root, record).plan.fragments_of(0)} == {1, 2}


OWNER: dict[int, torch.optim.Optimizer] = {}


def _by_mesh(leaf: TensorLeaf, rank: int) -> TensorLeaf:
    cut = replace(leaf.cut, holders=(0, 1, 2), proof=Proof.MESH)
    return replace(leaf, cut=cut, owned_by=weakref.ref(OWNER[rank]))


def test_sharded_boxes_need_no_proof() -> None:
    root = fresh()

    def run(ranks: Ranks) -> None:
        with open_on(ranks, root, {"w": sharded(torch.ones(2), (4,), (2 * ranks.rank,))}) as ckpt:
            ckpt.save(1).wait()

    job(2, run)
    state = {"w": torch.zeros(4)}
    load(root, [state])
    assert state["w"].tolist() == [1.0] * 4
