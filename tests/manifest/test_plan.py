"""The rules of a plan, against a slow twin and one by one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dscheck.errors import LayoutError
from dscheck.layout.region import Region
from dscheck.manifest.dtypes import ITEMSIZE
from dscheck.manifest.fragments import Fragment, Fragments
from dscheck.manifest.plan import Plan, RankRow, TensorRow
from tests.manifest.plans import mutated, plans
from tests.manifest.slow_rules import holds

TENSORS = (TensorRow("a", "float32", (4, 3), ("z",)), TensorRow("b", "int64", ()), TensorRow("c", "bool", (0, 2)))
FRAGMENTS = Fragments.of(
    [
        Fragment(0, Region((0, 0), (2, 3)), 0, 0, 24, 0, 0),
        Fragment(0, Region((2, 0), (4, 3)), 1, 0, 24, 0, 1),
        Fragment(1, Region((), ()), 1, 64, 8, 2, 2),
    ]
)
PLAN = Plan(TENSORS, FRAGMENTS, (RankRow(0, "h0", (("dp", 0),)), RankRow(1, "h1")), ((0,), (1,), (0, 1)), 16)


def fragment(row: int, **fields: Any) -> Plan:
    rows = list(PLAN.fragments)
    rows[row] = dataclasses.replace(rows[row], **fields)
    return dataclasses.replace(PLAN, fragments=Fragments.of(rows))


def tensor(row: int, **fields: Any) -> Plan:
    rows = list(PLAN.tensors)
    rows[row] = dataclasses.replace(rows[row], **fields)
    return dataclasses.replace(PLAN, tensors=tuple(rows))


def refuses(plan: Plan, match: str) -> None:
    with pytest.raises(LayoutError, match=match):
        plan.validate()


@given(plans())
@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_a_plan_that_holds_is_valid(plan: Plan) -> None:
    assert holds(plan)
    plan.validate()


@given(st.data())
@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_a_changed_plan_is_valid_exactly_when_it_holds(data: st.DataObject) -> None:
    plan = data.draw(mutated(data.draw(plans())))
    try:
        plan.validate()
    except LayoutError:
        assert not holds(plan)
    else:
        assert holds(plan)


def test_the_sample_is_valid() -> None:
    PLAN.validate()
    Plan((), Fragments.of([]), (), (), 1).validate()


def test_tensors_ascend_by_code_points() -> None:
    """format F35"""
    names = ("Z", "a", "a.b", "é", "\uffff", "\U00010000")
    rows = tuple(TensorRow(name, "int8", (0,)) for name in names)
    dataclasses.replace(PLAN, tensors=rows, fragments=Fragments.of([])).validate()
    refuses(dataclasses.replace(PLAN, tensors=rows[::-1], fragments=Fragments.of([])), "not in ascending order")
    refuses(tensor(0, name="bb"), "tensors are not in ascending order")


def test_aliases_ascend_and_find_their_tensor() -> None:
    """format F36"""
    refuses(tensor(0, aliases=("z", "y")), "aliases of tensor 'a' are not in ascending order")
    assert PLAN.index() == {"a": 0, "z": 0, "b": 1, "c": 2}


@pytest.mark.parametrize("aliases", [("a",), ("b",), ("c", "z")])
def test_a_name_belongs_to_one_tensor(aliases: tuple[str, ...]) -> None:
    """format F37"""
    refuses(tensor(0, aliases=aliases), "belong to two tensors")


def test_a_name_is_not_empty() -> None:
    """format F37"""
    refuses(tensor(0, name=""), "empty name")
    refuses(tensor(1, aliases=("",)), "empty name")


@pytest.mark.parametrize("shape", [(-1,), (1,) * 65, (2**63,), (2**62, 2), (0, 2**40, 2**40), (2**61,)])
def test_a_shape_that_overflows_is_refused(shape: tuple[int, ...]) -> None:
    """format F38"""
    refuses(tensor(2, dtype="int64", shape=shape), "impossible shape|exceeds 2")


@pytest.mark.parametrize("shape", [(0, 2**40), (1,) * 63 + (0,), (0, 2**60 - 1)])
def test_a_shape_up_to_the_limit_is_fine(shape: tuple[int, ...]) -> None:
    """format F38"""
    tensor(2, dtype="int64", shape=shape).validate()


def test_an_unknown_dtype_is_refused() -> None:
    """format F39"""
    refuses(tensor(0, dtype="float31"), "unknown dtype 'float31'")


@pytest.mark.parametrize("row", [-1, 3, 2**31 - 1])
def test_a_fragment_has_a_tensor_and_a_holder_set(row: int) -> None:
    """format F43, F51"""
    refuses(fragment(2, tensor=row), "names no tensor")
    refuses(fragment(2, holders=row), "names no holder set")


@pytest.mark.parametrize(
    ("start", "stop"), [((2, 0), (5, 3)), ((2, 0), (4, 4)), ((2, 0), (2, 3)), ((2, 3), (4, 3)), ((2,), (4,)), ((), ())]
)
def test_a_region_is_a_box_inside_its_tensor(start: tuple[int, ...], stop: tuple[int, ...]) -> None:
    """format F7, F44"""
    box = Region(start, stop)
    refuses(fragment(1, region=box, nbytes=4 * box.numel), "lies outside|not the dimensions")


def test_bounds_are_half_open_and_not_negative() -> None:
    """format F7"""
    assert Region((2, 0), (4, 3)).numel == 6
    assert Region((), ()).numel == 1
    for start, stop in (((-1,), (2,)), ((3,), (2,)), ((0,), (1, 2))):
        with pytest.raises(LayoutError):
            Region(start, stop)


@pytest.mark.parametrize("nbytes", [0, -24, 23, 25, 48])
def test_nbytes_are_those_of_the_region(nbytes: int) -> None:
    """format F45"""
    refuses(fragment(0, nbytes=nbytes), "not the bytes of its region")


def test_fragments_ascend_by_tensor_then_start() -> None:
    """format F46"""
    a, b, c = PLAN.fragments
    for rows in ((b, a, c), (c, a, b), (a, a, c)):
        refuses(dataclasses.replace(PLAN, fragments=Fragments.of(rows)), "out of order")
    assert [list(PLAN.fragments_of(tensor)) for tensor in range(3)] == [[a, b], [c], []]


def test_starts_are_compared_dimension_by_dimension() -> None:
    """format F46"""
    boxes = [Region((i, j), (i + 1, j + 1)) for i in range(4) for j in range(3)]
    rows = [Fragment(0, box, 0, 64 * k, 4, k, 0) for k, box in enumerate(boxes)]
    dataclasses.replace(PLAN, fragments=Fragments.of(rows)).validate()
    swapped = (rows[0], rows[3], *rows[1:3], *rows[4:])
    refuses(dataclasses.replace(PLAN, fragments=Fragments.of(swapped)), r"'a' \[0:1, 1:2\] is out of order")


@pytest.mark.parametrize("writer", [0, -1, 2, 2**31 - 1])
def test_a_writer_holds_what_it_writes(writer: int) -> None:
    """format F48, F51"""
    refuses(fragment(1, writer=writer), "written by a rank that does not hold it")


def test_ranks_are_numbered_from_zero() -> None:
    """format F49"""
    refuses(dataclasses.replace(PLAN, ranks=PLAN.ranks[::-1]), "row 0 of the ranks is rank 1")


@pytest.mark.parametrize("mesh", [(("dp", 0), ("dp", 1)), (("dp", -1),), (("dp", 2**31),)])
def test_a_mesh_coordinate_has_distinct_names_and_indices(mesh: tuple[tuple[str, int], ...]) -> None:
    """format F50"""
    refuses(dataclasses.replace(PLAN, ranks=(PLAN.ranks[0], RankRow(1, "h", mesh))), "impossible mesh coordinate")


@pytest.mark.parametrize("members", [(), (1, 0), (0, 0), (-1, 0), (0, 2)])
def test_a_holder_set_is_an_ascending_set_of_ranks(members: tuple[int, ...]) -> None:
    """format F51"""
    refuses(dataclasses.replace(PLAN, holders=(*PLAN.holders, members)), "not an ascending set of the 2 ranks")


@pytest.mark.parametrize("block_bytes", [0, -1, 2**30 + 1])
def test_a_block_has_a_size(block_bytes: int) -> None:
    """format F52"""
    refuses(dataclasses.replace(PLAN, block_bytes=block_bytes), "a block has 1 to")


@pytest.mark.parametrize("offset", [1, 32, -64, 2**63 - 64 + 56])
def test_a_small_fragment_lies_at_a_multiple_of_64(offset: int) -> None:
    """format F56"""
    refuses(fragment(0, offset=offset), "not aligned")


def test_a_large_fragment_lies_on_a_page() -> None:
    """format F56"""
    large = TensorRow("a", "uint8", (1 << 20,))
    rows = (Fragment(0, Region((0,), (1 << 20,)), 0, 64, 1 << 20, 0, 0),)
    refuses(dataclasses.replace(PLAN, tensors=(large,), fragments=Fragments.of(rows)), "not aligned")
    on_page = Fragments.of([dataclasses.replace(rows[0], offset=4096)])
    dataclasses.replace(PLAN, tensors=(large,), fragments=on_page).validate()


def test_a_fragment_ends_below_the_largest_offset() -> None:
    """format F56"""
    row = TensorRow("a", "uint8", (100,))
    for offset, fits in ((2**63 - 192, True), (2**63 - 64, False)):
        fragments = Fragments.of([Fragment(0, Region((0,), (100,)), 0, offset, 100, 0, 0)])
        plan = dataclasses.replace(PLAN, tensors=(row,), fragments=fragments)
        if fits:
            plan.validate()
        else:
            refuses(plan, "not aligned, or impossible")


def test_fragments_of_a_file_do_not_overlap() -> None:
    """format F57"""
    refuses(fragment(2, offset=0, first_block=2), "overlaps another one")


@pytest.mark.parametrize("first_block", [0, 1, 3, -1])
def test_blocks_are_counted_in_the_order_of_offsets(first_block: int) -> None:
    """format F59"""
    refuses(fragment(2, first_block=first_block), "miscounts blocks")


def test_a_number_that_its_column_does_not_hold_is_refused() -> None:
    """format F33"""
    for fields in ({"tensor": 2**31}, {"writer": -(2**31) - 1}, {"offset": 2**63}, {"region": Region((0,), (2**63,))}):
        with pytest.raises(LayoutError, match="exceeds"):
            fragment(0, **fields)


def test_file_ends_speak_of_every_rank() -> None:
    """format F60"""
    assert PLAN.file_ends() == [(24, 2), (72, 3)]


def test_itemsizes_are_those_of_torch() -> None:
    """format F39, F41"""
    torch = pytest.importorskip("torch")
    for name, size in ITEMSIZE.items():
        if hasattr(torch, name):
            assert getattr(torch, name).itemsize == size
    assert ITEMSIZE["float4_e2m1fn_x2"] == 1
