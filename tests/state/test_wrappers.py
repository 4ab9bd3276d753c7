"""Wrapper subclasses: stored by their inner tensors, and put back into live ones of the same kind only (TRAPS 12)."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.two_tensor import TwoTensor

from dscheck.errors import ConfigError, StateError, StateMismatchError
from dscheck.state import FlatState, LiveState, Proof, sharded
from tests.state.coded import Coded, CodedMomentum, coded
from tests.state.fake_ranks import on_each
from tests.state.roundtrip import load, save


def module(weight: torch.Tensor) -> nn.Module:
    made = nn.Module()
    made.weight = nn.Parameter(weight, requires_grad=False)
    return made


def flat(state: dict[str, Any]) -> FlatState:
    return LiveState(state, rank=0, world=1, rng=False).flatten()


def same(one: Any, other: Any) -> bool:
    return torch.equal(one.codes, other.codes) and torch.equal(one.scale, other.scale)


def test_the_inner_tensors_of_a_wrapper_are_tensors_of_their_own() -> None:
    weight = coded(4, 8)
    found = flat({"model": module(weight)})
    assert [leaf.name for leaf in found.tensors] == ["model.weight.codes", "model.weight.scale"]
    assert [local.data_ptr() for local in found.locals] == [weight.codes.data_ptr(), weight.scale.data_ptr()]
    assert found.ours == {
        "model.weight": {
            "dscheck.wrapper": {
                "shape": [4, 8],
                "class": "tests.state.coded.Coded",
                "dtype": "torch.float32",
                "metadata": [True, "torch.float32"],
                "inner": {"codes": "torch.uint8", "scale": "torch.float32"},
            }
        }
    }


@pytest.mark.parametrize("place", [module, lambda weight: weight, lambda weight: {"deep": [weight]}])
def test_a_wrapper_is_filled_in_place(place: Callable[[Coded], Any]) -> None:
    checkpoint = save({"x": place(coded(4, 8, seed=1))})
    live = coded(4, 8, seed=2)
    pointers = live.codes.data_ptr(), live.scale.data_ptr()
    load(checkpoint, {"x": place(live)})
    assert same(live, coded(4, 8, seed=1))
    assert (live.codes.data_ptr(), live.scale.data_ptr()) == pointers


def test_wrappers_in_wrappers_are_taken_apart_to_the_last() -> None:
    def nested(seed: int) -> TwoTensor:
        return TwoTensor(coded(4, 4, seed=seed), TwoTensor(torch.full((4, 4), float(seed)), torch.ones(4, 4)))

    checkpoint = save({"x": nested(3)})
    assert checkpoint.tensors.keys() == {"x.a.codes", "x.a.scale", "x.b.a", "x.b.b"}
    live = nested(4)
    load(checkpoint, {"x": live})
    assert same(live.a, coded(4, 4, seed=3))
    assert torch.equal(live.b.a, torch.full((4, 4), 3.0))


def trained(steps: int, seed: int = 0) -> tuple[nn.Module, CodedMomentum]:
    torch.manual_seed(seed)
    model = nn.Linear(8, 4, bias=False)
    optimizer = CodedMomentum(model.parameters())
    for _ in range(steps):
        optimizer.step()
    return model, optimizer


def test_coded_optimizer_state_comes_back_and_belongs_to_its_optimizer() -> None:
    model, optimizer = trained(3)
    state = {"model": model, "optimizer": optimizer}
    owners = {leaf.name: leaf.owner for leaf in flat(state).tensors}
    assert owners["optimizer.state.momentum.model.weight.codes"] is optimizer
    assert owners["optimizer.state.momentum.model.weight.scale"] is optimizer
    fresh, again = trained(1, seed=5)
    load(save(state), {"model": fresh, "optimizer": again})
    optimizer.step()
    again.step()
    assert torch.equal(fresh.weight, model.weight)
    assert same(again.state[fresh.weight]["momentum"], optimizer.state[model.weight]["momentum"])


def test_a_stepped_wrapper_parameter_is_owned_through_its_inner_tensors() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(coded(4, 8))
    optimizer = torch.optim.SGD(model.parameters())
    owners = {leaf.owner for leaf in flat({"model": model, "optimizer": optimizer}).tensors}
    assert owners == {optimizer}


def test_missing_coded_state_asks_for_a_step_first() -> None:
    """Nothing in a checkpoint may choose a class to make (invariant C9)."""
    model, optimizer = trained(2)
    checkpoint = save({"model": model, "optimizer": optimizer})
    fresh, again = trained(0)
    with pytest.raises(StateMismatchError, match=r"momentum\.model\.weight' was saved as a tests\.state\.coded\.Coded.*"
                       r"let the optimizer step once"):  # fmt: skip
        load(checkpoint, {"model": fresh, "optimizer": again})
    assert not again.state


def test_coded_state_is_not_filled_from_plain_state_nor_the_other_way() -> None:
    def plain() -> tuple[nn.Module, torch.optim.Optimizer]:
        model, optimizer = trained(1)
        optimizer.state[model.weight]["momentum"] = torch.ones(4, 8)
        return model, optimizer

    names = ("model", "optimizer")
    with pytest.raises(StateMismatchError, match=r"saved as a plain float32 tensor"):
        load(save(dict(zip(names, plain(), strict=True))), dict(zip(names, trained(1), strict=True)))
    with pytest.raises(StateMismatchError, match=r"was saved as a .*Coded and is plain here"):
        load(save(dict(zip(names, trained(1), strict=True))), dict(zip(names, plain(), strict=True)))


def test_a_wrapped_weight_is_not_filled_from_a_plain_one_nor_the_other_way() -> None:
    with pytest.raises(StateMismatchError, match=r"'x' is a .*Coded here and was saved as a plain float32 tensor"):
        load(save({"x": torch.ones(4, 8)}), {"x": coded(4, 8)})
    with pytest.raises(StateMismatchError, match=r"'x' was saved as a .*Coded and is a plain tensor here"):
        load(save({"x": coded(4, 8)}), {"x": torch.ones(4, 8)})


OTHERS = {
    "metadata": coded(4, 8, meta=(False, torch.float32)),
    "class": TwoTensor(torch.ones(4, 8), torch.ones(4, 8)),
    "shape": coded(8, 4),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_wrapper_that_differs_from_the_saved_one_is_refused_by_name(what: str) -> None:
    live = OTHERS[what]
    before = live.clone()
    with pytest.raises(StateMismatchError, match=rf"'x'.*{what} .* saved, .* live"):
        load(save({"x": coded(4, 8)}), {"x": live}, strict=False)
    assert torch.equal(live, before)


def test_a_wrapper_that_the_checkpoint_lacks_is_missing_by_its_name() -> None:
    with pytest.raises(StateMismatchError, match=r"lacks 'x\.codes', 'x\.scale', 'x'"):
        load(save({"y": torch.ones(1)}), {"x": coded(4, 8), "y": torch.ones(1)})


def test_a_part_of_a_wrapper_is_not_loaded_alone() -> None:
    with pytest.raises(ConfigError, match="'x' is one tensor"):
        load(save({"x": coded(4, 8)}), {"x": coded(4, 8)}, only=["x.codes"])


def test_a_tied_wrapper_is_stored_once_and_found_by_any_name() -> None:
    tied = coded(4, 8, seed=1)
    checkpoint = save({"a": tied, "b": tied})
    assert checkpoint.aliases == {"b.codes": "a.codes", "b.scale": "a.scale"}
    live = coded(4, 8, seed=2)
    load(checkpoint, {"b": live})
    assert same(live, tied)


def test_an_inner_tensor_that_was_replaced_is_saved_as_it_is_now() -> None:
    weight = coded(4, 8)
    live = LiveState({"x": weight}, rank=0, world=1, rng=False)
    assert live.flatten().locals[0] is weight.codes
    weight.codes = torch.zeros(4, 8, dtype=torch.uint8)
    assert live.flatten().locals[0] is weight.codes


CODES: dict[int, torch.Tensor] = {}


class Apart(Coded):
    """Keeps its codes outside itself."""

    @property
    def codes(self) -> torch.Tensor:  # type: ignore[override]
        return CODES[id(self)]

    @codes.setter
    def codes(self, value: torch.Tensor) -> None:
        CODES[id(self)] = value


def test_an_inner_tensor_that_is_kept_elsewhere_is_saved_as_it_is_now() -> None:
    one = coded(4, 8)
    weight = Apart(one.codes, one.scale, one.meta)
    live = LiveState({"x": weight}, rank=0, world=1, rng=False)
    live.flatten()
    weight.codes = torch.zeros(4, 8, dtype=torch.uint8)
    assert live.flatten().locals[0] is weight.codes


class Mode(enum.Enum):
    ROWS = 1


@dataclass
class Recipe:
    mode: Mode
    sizes: tuple[int, ...]
    device: torch.device


@pytest.mark.parametrize(
    ("metadata", "change", "expected"),
    [
        ([1, 32], lambda weight: weight.meta.append(4), [1, 32, 4]),
        ((True,), lambda weight: setattr(weight, "meta", (False,)), [False]),
        (Recipe(Mode.ROWS, (1,), torch.device("cpu")), lambda weight: setattr(weight.meta, "sizes", ()), []),
    ],
    ids=["list", "tuple", "dataclass"],
)
def test_metadata_that_has_changed_is_saved_as_it_is_now(
    metadata: Any, change: Callable[[Coded], None], expected: Any
) -> None:
    weight = coded(4, 8, meta=metadata)
    live = LiveState({"x": weight}, rank=0, world=1, rng=False)
    live.flatten()
    change(weight)
    stored = live.flatten().ours["x"]["dscheck.wrapper"]["metadata"]
    assert (stored["sizes"] if isinstance(stored, dict) else stored) == expected


def test_plain_metadata_of_any_shape_is_stored_without_its_device() -> None:
    metadata = {"recipe": Recipe(Mode.ROWS, (1, -1), torch.device("cpu")), "eps": 0.5, "kind": int, "layout": None}
    stored = flat({"x": coded(4, 8, meta=metadata)}).ours["x"]["dscheck.wrapper"]["metadata"]
    here = "tests.state.test_wrappers"
    recipe = {"class": f"{here}.Recipe", "mode": f"{here}.Mode.ROWS", "sizes": [1, -1], "device": None}
    assert stored == {"recipe": recipe, "eps": 0.5, "kind": "builtins.int", "layout": None}


@pytest.mark.parametrize("metadata", [object(), [lambda: 0], {1: 2}, {"t": torch.ones(1)}])
def test_metadata_that_is_no_plain_data_is_refused_by_path(metadata: Any) -> None:
    with pytest.raises(StateError, match=r"'model\.weight': its flatten metadata has a"):
        flat({"model": module(coded(4, 8, meta=metadata))})


class Opaque(torch.Tensor):
    """Wraps memory that nothing names."""

    @staticmethod
    def __new__(cls) -> Opaque:
        return torch.Tensor._make_wrapper_subclass(cls, (2,))  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError


def test_a_wrapper_that_does_not_say_what_it_wraps_is_refused_by_path() -> None:
    with pytest.raises(StateError, match=r"'x' is a Opaque, which wraps other tensors"):
        flat({"x": Opaque()})


class Loader:
    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> Any:
        return {"queue": [self.value]}

    def load_state_dict(self, state: Any) -> None:
        self.value = state["queue"][0]


@pytest.mark.parametrize("size", [8, 1 << 20])
def test_wrappers_inside_plain_objects_are_refused_by_path(size: int) -> None:
    with pytest.raises(StateError, match=r"'loader\.queue\.0' is a Coded"):
        flat({"loader": Loader(coded(size))})


def test_a_hand_made_shard_of_a_wrapper_is_refused_by_path() -> None:
    with pytest.raises(StateError, match=r"'x\.scale'.*Coded that holds \[4, 8\] of \[8, 8\]"):
        flat({"x": sharded(coded(4, 8), (8, 8), (0, 0))})


def shards(rank: int, world: int, placements: list[Any], rows: int = 8) -> dict[str, Any]:
    """A DTensor whose local tensor is coded, with the rank as its seed."""
    mesh = init_device_mesh("cpu", (world,))
    local = coded(rows // world if placements[0].is_shard() else rows, 8, seed=rank + 1)
    return {"x": DTensor.from_local(local, mesh, placements, run_check=False)}


def flats(world: int, placements: list[Any]) -> list[FlatState]:
    return on_each(world, lambda rank: LiveState(shards(rank, world, placements), rank=rank, world=world, rng=False)
                   .flatten())  # fmt: skip


def test_shards_of_a_wrapper_keep_codes_as_they_are_cut_and_stack_what_each_has_alone() -> None:
    found = flats(2, [Shard(0)])
    checkpoint = save(found)
    mine = [coded(4, 8, seed=rank + 1) for rank in range(2)]
    assert torch.equal(checkpoint.tensors["x.codes"], torch.cat([one.codes for one in mine]))
    assert torch.equal(checkpoint.tensors["x.scale"], torch.stack([one.scale for one in mine]))
    assert {leaf.cut.proof for leaf in found[0].tensors} == {Proof.MESH}

    def again(rank: int) -> bool:
        live = shards(rank + 7, 2, [Shard(0)])
        load(checkpoint, live, rank=rank, world=2)
        return same(live["x"]._local_tensor, mine[rank])

    assert on_each(2, again) == [True, True]


def test_replicas_of_a_wrapper_are_proved_by_their_mesh() -> None:
    for found in flats(2, [Replicate()]):
        assert [(leaf.cut.holders, leaf.cut.proof) for leaf in found.tensors] == [((0, 1), Proof.MESH)] * 2


def test_uneven_shards_of_a_wrapper_are_refused_by_path() -> None:
    def run(rank: int) -> str:
        mesh = init_device_mesh("cpu", (2,))
        local = coded(2 - rank, 8)
        tensor = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=torch.Size((3, 8)), stride=(8, 1))
        with pytest.raises(StateError) as caught:
            LiveState({"x": tensor}, rank=rank, world=2, rng=False).flatten()
        return str(caught.value)

    for message in on_each(2, run):
        assert "'x.scale'" in message
        assert "evenly" in message
