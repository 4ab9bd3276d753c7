"""The rule of docs/plan.md, line by line, and that its cuts tile every tensor."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dscheck.errors import ConfigError
from dscheck.layout import Region, prove_cover
from dscheck.layout.recipe import AXES, Override, Recipe, parse_degrees

NAMES = {
    "model.embed.weight": (50, 8),
    "model.layers.0.attn.q_proj.weight": (8, 8),
    "model.layers.0.attn.o_proj.weight": (8, 6),
    "model.layers.1.mlp.w2": (9, 7),
    "model.layers.2.mlp.experts.0.w1": (6, 8),
    "model.layers.2.mlp.experts.3.w2": (6, 8),
    "model.layers.3.mlp.experts.w1": (4, 6, 8),
    "model.layers.3.norm": (8,),
    "optimizer.state.exp_avg.model.layers.3.norm": (8,),
    "optimizer.state.step.model.layers.3.norm": (),
}


def recipe(to: str, *cuts: str) -> Recipe:
    return Recipe.of(parse_degrees(to), [Override.parse(cut) for cut in cuts], NAMES)


def held(to: str, name: str, *cuts: str) -> list[list[str]]:
    """What each rank holds of a tensor."""
    made = recipe(to, *cuts)
    ranks = range(made.ranks)
    return [list(map(str, made.regions(name, NAMES[name], made.coordinate(rank)))) for rank in ranks]


@given(st.fixed_dictionaries({axis: st.integers(1, 4) for axis in AXES}), st.sampled_from(sorted(NAMES)))
def test_what_all_ranks_hold_tiles_each_tensor(degrees: dict[str, int], name: str) -> None:
    """Each distinct region once; a tensor that is replicated is one."""
    made = Recipe.of(degrees, [], NAMES)
    regions: set[Region] = set()
    for rank in range(made.ranks):
        regions.update(made.regions(name, NAMES[name], made.coordinate(rank)))
    prove_cover(name, NAMES[name], regions)


def test_ranks_are_counted_from_the_fastest_axis() -> None:
    made = recipe("tp=2,dp=3,pp=2")
    assert [tuple(made.coordinate(rank).values()) for rank in (0, 1, 2, 6, 11)] == [
        (0, 0, 0, 0, 0),
        (0, 0, 0, 0, 1),
        (0, 1, 0, 0, 0),
        (1, 0, 0, 0, 0),
        (1, 2, 0, 0, 1),
    ]


def test_layers_go_to_stages_in_equal_groups() -> None:
    assert held("pp=2", "model.layers.1.mlp.w2") == [["[0:9, 0:7]"], []]
    assert held("pp=2", "model.layers.2.mlp.experts.0.w1") == [[], ["[0:6, 0:8]"]]
    assert held("pp=2", "optimizer.state.step.model.layers.3.norm") == [[], ["[]"]]


def test_what_has_no_layer_is_on_every_stage_and_named() -> None:
    made = recipe("pp=2")
    for rank in (0, 1):
        assert made.regions("model.embed.weight", (50, 8), made.coordinate(rank))
    assert made.unsure == {"model.embed.weight"}
    placed = recipe("pp=2", "embed:pp=1")
    assert not placed.regions("model.embed.weight", (50, 8), placed.coordinate(0))
    assert placed.unsure == set()


def test_tensor_parallelism_cuts_the_first_dimension_or_the_second_by_name() -> None:
    assert held("tp=2", "model.layers.0.attn.q_proj.weight") == [["[0:4, 0:8]"], ["[4:8, 0:8]"]]
    assert held("tp=2", "model.layers.0.attn.o_proj.weight") == [["[0:8, 0:3]"], ["[0:8, 3:6]"]]
    assert held("tp=2", "model.layers.3.norm") == [["[0:8]"]] * 2
    assert held("tp=2", "model.layers.3.mlp.experts.w1") == [["[0:4, 0:3, 0:8]"], ["[0:4, 3:6, 0:8]"]]


def test_experts_go_to_ranks_in_equal_groups() -> None:
    assert held("ep=2", "model.layers.2.mlp.experts.0.w1") == [["[0:6, 0:8]"], []]
    assert held("ep=2", "model.layers.2.mlp.experts.3.w2") == [[], ["[0:6, 0:8]"]]
    assert held("ep=2", "model.layers.3.mlp.experts.w1") == [["[0:2, 0:6, 0:8]"], ["[2:4, 0:6, 0:8]"]]
    assert held("ep=2", "model.layers.3.norm") == [["[0:8]"]] * 2


def test_fsdp_cuts_behind_tensor_parallelism() -> None:
    assert held("fsdp=2,tp=2", "model.layers.0.attn.q_proj.weight") == [
        ["[0:2, 0:8]"],
        ["[4:6, 0:8]"],
        ["[2:4, 0:8]"],
        ["[6:8, 0:8]"],
    ]


def test_data_parallelism_cuts_nothing() -> None:
    assert held("dp=3", "model.layers.1.mlp.w2") == [["[0:9, 0:7]"]] * 3


def test_patterns_replace_the_rule() -> None:
    assert held("tp=2", "model.layers.1.mlp.w2", r"w2$:tp=0") == [["[0:5, 0:7]"], ["[5:9, 0:7]"]]
    assert held("tp=2", "model.layers.1.mlp.w2", r"mlp:tp=no", r"w2:tp=0") == [["[0:9, 0:7]"]] * 2
    assert held("fsdp=2", "model.layers.1.mlp.w2", r"w2:fsdp=1") == [["[0:9, 0:4]"], ["[0:9, 4:7]"]]
    assert held("ep=2", "model.layers.2.mlp.experts.0.w1", r"experts:ep=no") == [["[0:6, 0:8]"]] * 2
    assert held("ep=2", "model.embed.weight", r"embed:ep=1") == [["[0:50, 0:4]"], ["[0:50, 4:8]"]]
    assert held("pp=2", "model.layers.1.mlp.w2", r"w2:pp=no") == [["[0:9, 0:7]"]] * 2


HUGE = "9" * 5000


@pytest.mark.parametrize(
    "text",
    ["", "tp", "tp=0", "tp=-1", "zp=2", "tp=2;pp=2", "tp=2,,pp=2", "tp=4,tp=2", "tp=1000001", "dp=2000,fsdp=2000"],
)
def test_a_layout_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--to"):
        parse_degrees(text)


def test_a_degree_of_thousands_of_digits_is_refused() -> None:
    with pytest.raises(ConfigError, match="at most 1000000 ranks"):
        parse_degrees(f"dp={HUGE}")


@pytest.mark.parametrize("text", ["", "w2", "w2:tp", "w2:tp=-1", "w2:dp=1", "(:tp=1", ":tp=1", f"w2:tp={HUGE}"])
def test_a_pattern_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--cut"):
        Override.parse(text)
