"""Plain data and objects with a state_dict: types kept, put back in place (TRAPS 13, 14, 16)."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from dscheck.errors import ConfigError, CorruptCheckpointError, StateError, StateMismatchError
from dscheck.state import LiveState, per_rank
from tests.state.roundtrip import Checkpoint, load, save

MIB = 1 << 20
SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [3, 5, 5, 8]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=6),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 9),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "CyclicLR-custom": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, scale_fn=lambda x: 0.5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.MultiStepLR(o, [2, 4])], milestones=[3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.StepLR(o, 2), lr_scheduler.ConstantLR(o)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=6),
}


def advance(optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        optimizer.step()
        scheduler.step(*[1.0] * isinstance(scheduler, lr_scheduler.ReduceLROnPlateau))
        rates.append(float(optimizer.param_groups[0]["lr"]))
    return rates


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_every_scheduler_goes_on_as_if_nothing_had_happened(name: str, tensor: bool) -> None:
    def make() -> dict[str, Any]:
        model = nn.Linear(1, 1)
        rate = torch.tensor(0.1) if tensor else 0.1
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, foreach=False)
        return {"model": model, "optimizer": optimizer, "scheduler": SCHEDULERS[name](optimizer)}

    live = make()
    advance(live["optimizer"], live["scheduler"], 4)
    checkpoint = save(live)
    expected = advance(live["optimizer"], live["scheduler"], 8)
    for behind in (0, 2):
        resumed = make()
        advance(resumed["optimizer"], resumed["scheduler"], behind)
        load(checkpoint, resumed)
        assert advance(resumed["optimizer"], resumed["scheduler"], 8) == expected


def test_all_schedulers_of_torch_are_tried() -> None:
    kinds = {
        name for name, kind in vars(lr_scheduler).items() if isinstance(kind, type) and name in lr_scheduler.__all__
    }
    assert kinds - {"LRScheduler"} <= SCHEDULERS.keys()


def test_a_disabled_grad_scaler_comes_back() -> None:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    load(save({"scaler": scaler}), {"scaler": scaler})


def test_an_enabled_grad_scaler_comes_back() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    checkpoint = save({"scaler": scaler})
    other = torch.amp.GradScaler("cpu")
    load(checkpoint, {"scaler": other})
    assert other.state_dict() == scaler.state_dict()


PLAIN: list[Any] = [
    None,
    True,
    0,
    2**80,
    -0.0,
    float("inf"),
    "text",
    b"\x00\xff",
    3 + 4j,
    (1, (2, 3)),
    [1, [2]],
    {"a": 1, "$": 2},
    {1: "one", (2, 3): "pair"},
    Counter({3: 2}),
    OrderedDict(b=1, a=2),
    defaultdict(int, {"a": 1}),
    deque([1, 2], maxlen=3),
    {1, 2},
    frozenset({3}),
    np.float32(0.1),
    np.arange(6).reshape(2, 3),
    {},
    [],
]


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: type(value).__name__)
def test_plain_data_comes_back_with_its_type(value: Any) -> None:
    checkpoint = save({"value": value})
    state = {"value": "another"}
    load(checkpoint, state)
    assert type(state["value"]) is type(value)
    assert np.array_equal(state["value"], value) if isinstance(value, np.ndarray) else state["value"] == value
    assert repr(state["value"]) == repr(value)


def test_a_number_at_the_top_is_read_at_every_save_and_written_back() -> None:
    state = {"step": 0}
    live = LiveState(state, rank=0, world=1)
    state["step"] = 7
    assert live.flatten().ours == {"step": 7}
    checkpoint = save(state)
    state["step"] = 9
    load(checkpoint, state)
    assert state["step"] == 7


@pytest.mark.parametrize(
    "value",
    [[1, 2], {"a": [1]}, OrderedDict(a=1), Counter("ab"), defaultdict(list, a=[1]), deque([1]), {1}, np.arange(3)],
    ids=lambda value: type(value).__name__,
)
def test_a_container_is_changed_in_place(value: Any) -> None:
    checkpoint = save({"value": value})
    expected = repr(value)
    if isinstance(value, np.ndarray):
        value[:] = 0
    else:
        value.clear()
    state = {"value": value}
    load(checkpoint, state)
    assert state["value"] is value
    assert repr(value) == expected


def test_nested_mappings_join_names_with_dots() -> None:
    model, state = nn.Linear(1, 1), {}
    state.update(train={"model": model, "best": 0.5, "twins": [nn.Linear(1, 1), nn.Linear(1, 1)]}, tags={"a": {"b": 1}})
    checkpoint = save(state)
    assert {"train.model.weight", "train.twins.0.weight", "train.twins.1.bias"} <= checkpoint.tensors.keys()
    assert checkpoint.flats[0].ours == {"train.best": 0.5, "tags": {"a": {"b": 1}}}
    state["train"]["best"] = 0.0
    load(checkpoint, state)
    assert state["train"]["best"] == 0.5


def test_what_a_load_could_not_put_back_is_refused_at_save() -> None:
    with pytest.raises(StateError, match=r"'pair\.1' is a int in a container that cannot be changed"):
        save({"pair": (torch.ones(1), 3)})


class Colour(str):
    pass


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"a": [1, object()]}, r"value\['a'\]\[1\].*object"),
        ([Colour("red")], r"value\[0\].*Colour"),
        ({"f": print}, r"value\['f'\]"),
        ([torch.float32], r"value\[0\].*dtype"),
    ],
)
def test_what_is_no_plain_data_is_refused_by_path(value: Any, path: str) -> None:
    with pytest.raises(StateError, match=path):
        save({"value": value})


def test_keys_that_cannot_be_part_of_a_name_are_refused() -> None:
    with pytest.raises(StateError, match="under the key 3"):
        save({"value": {3: torch.ones(1)}})


def test_a_mapping_that_contains_itself_is_refused() -> None:
    state: dict[str, Any] = {"model": nn.Linear(1, 1)}
    state["self"] = state
    with pytest.raises(StateError, match="contains itself"):
        save({"state": state})


def test_a_container_may_be_met_twice() -> None:
    shared = {"w": torch.ones(2)}
    assert save({"a": [shared, shared]}).aliases == {"a.1.w": "a.0.w"}


@pytest.mark.parametrize("name", ["dscheck", "dscheck.rng", "", 3])
def test_reserved_names_are_refused(name: Any) -> None:
    with pytest.raises(StateError, match="the state has the name"):
        save({name: 1})


class Foreign:
    """Has a state_dict with tensors, as an EMA or a metric has: copies are handed out, and copied back."""

    def __init__(self, **state: Any) -> None:
        self.state = state
        self.loaded: Any = None

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state


def test_small_tensors_belong_to_the_object_and_large_ones_are_tensors() -> None:
    big, array = torch.arange(MIB // 4, dtype=torch.int32), np.arange(MIB // 8)
    checkpoint = save({"ema": Foreign(shadow={"big": big, "small": torch.ones(3)}, arrays=(array, np.ones(2)))})
    assert {name: tuple(tensor.shape) for name, tensor in checkpoint.tensors.items()} == {
        "ema.shadow.big": (MIB // 4,),
        "ema.arrays.0": (MIB // 8,),
    }
    other = Foreign()
    load(checkpoint, {"ema": other})
    assert torch.equal(other.loaded["shadow"]["big"], big)
    assert torch.equal(other.loaded["shadow"]["small"], torch.ones(3))
    assert type(other.loaded["arrays"]) is tuple
    assert isinstance(other.loaded["arrays"][0], np.ndarray)
    assert np.array_equal(other.loaded["arrays"][0], array)


def test_a_large_tensor_of_an_object_is_filled_where_it_lies() -> None:
    checkpoint = save({"ema": Foreign(shadow=torch.full((MIB,), 2.0))})
    memory = torch.zeros(MIB)
    other = Foreign(shadow=memory)
    load(checkpoint, {"ema": other})
    assert other.loaded["shadow"] is memory
    assert memory[-1] == 2.0


def test_a_large_tensor_of_another_shape_is_new_memory() -> None:
    checkpoint = save({"ema": Foreign(shadow=torch.full((MIB,), 2.0))})
    other = Foreign(shadow=torch.zeros(MIB // 2))
    load(checkpoint, {"ema": other})
    assert other.loaded["shadow"].shape == (MIB,)


@pytest.mark.parametrize("overlapping", [torch.zeros(1).expand(MIB), torch.zeros(MIB).as_strided((1024, 512), (1, 1))])
def test_a_large_tensor_that_overlaps_itself_is_new_memory(overlapping: torch.Tensor) -> None:
    expected = torch.arange(overlapping.numel(), dtype=torch.float32).view(overlapping.shape)
    checkpoint = save({"ema": Foreign(shadow=expected)})
    other = Foreign(shadow=overlapping)
    load(checkpoint, {"ema": other})
    assert torch.equal(other.loaded["shadow"], expected)
    assert not overlapping.any()


@pytest.mark.parametrize("method", ["state_dict", "load_state_dict"])
def test_what_an_objects_own_code_raises_names_the_object(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*_: Any) -> Any:
        raise KeyError("shadow")

    checkpoint = save({"ema": Foreign()})
    monkeypatch.setattr(Foreign, method, raises)
    with pytest.raises(StateError, match=rf"'ema': Foreign\.{method}\(\) raised KeyError: 'shadow'") as caught:
        save({"ema": Foreign()}) if method == "state_dict" else load(checkpoint, {"ema": Foreign()})
    assert caught.value.path == "ema"
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_large_tensor_that_is_a_parameter_is_a_tie() -> None:
    model = nn.Linear(1024, 1024, bias=False)
    checkpoint = save({"model": model, "watch": Foreign(w=model.weight)})
    assert checkpoint.aliases == {"watch.w": "model.weight"}


def test_the_key_of_references_is_refused_in_user_data() -> None:
    with pytest.raises(StateError, match=r"'value' has the key 'dscheck\.tensor'"):
        save({"value": {"dscheck.tensor": "model.weight"}})


def test_a_reference_to_a_tensor_that_is_not_there_is_damage() -> None:
    checkpoint = save({"ema": Foreign(shadow=torch.ones(MIB))})
    del checkpoint.tensors["ema.shadow"]
    with pytest.raises(CorruptCheckpointError, match=r"'ema\.shadow', which the checkpoint lacks"):
        load(checkpoint, {"ema": Foreign()})


def test_an_object_is_read_before_flatten_returns() -> None:
    history = [1]
    flat = LiveState({"loader": Foreign(history=history, t=torch.ones(1))}, rank=0, world=1).flatten()
    before = repr(flat.ours)
    history.append(2)
    assert repr(flat.ours) == before


GENERATORS: list[Callable[[int], Any]] = [
    lambda seed: torch.Generator().manual_seed(seed),
    lambda seed: np.random.default_rng(seed),
    lambda seed: np.random.Generator(np.random.MT19937(seed)),
    lambda seed: np.random.Generator(np.random.Philox(seed)),
    lambda seed: np.random.Generator(np.random.SFC64(seed)),
    lambda seed: np.random.RandomState(seed),
    lambda seed: random.Random(seed),
]


def draw(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return torch.rand(5, generator=generator).tolist()
    if isinstance(generator, random.Random):
        return [generator.gauss(0, 1) for _ in range(3)]
    return [generator.normal() for _ in range(3)]


@pytest.mark.parametrize("make", GENERATORS)
def test_generators_go_on_where_they_were(make: Callable[[int], Any]) -> None:
    generator = make(3)
    draw(generator)
    checkpoint = save({"generator": generator})
    expected = draw(generator)
    other = make(4)
    load(checkpoint, {"generator": other})
    assert draw(other) == expected


def test_another_kind_of_generator_is_refused_before_anything_is_touched() -> None:
    checkpoint = save({"number": 1, "generator": np.random.default_rng(3)})
    state = {"number": 2, "generator": np.random.Generator(np.random.Philox(3))}
    with pytest.raises(StateMismatchError, match="bit_generator Philox here and was saved with PCG64"):
        load(checkpoint, state)
    assert state["number"] == 2


class ShufflingLoader:
    """As StatefulDataLoader: the order comes from the global stream, and a resume draws from it again."""

    def __init__(self, workers: int) -> None:
        self.workers, self.at = workers, 0
        self.start = torch.get_rng_state()
        self.batches: Any = None

    def __next__(self) -> list[int]:
        if self.batches is None:
            loader = torch.utils.data.DataLoader(range(8), shuffle=True, num_workers=self.workers)  # type: ignore[arg-type]
            self.start = torch.get_rng_state()
            self.batches = iter(loader)
        self.at += 1
        return next(self.batches).tolist()  # type: ignore[no-any-return]

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "start": self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["start"])
        self.at, self.batches = 0, None
        for _ in range(state["at"]):
            next(self)


@pytest.mark.parametrize("workers", [0, 2])
def test_random_streams_are_restored_after_the_loader_that_draws_from_them(workers: int) -> None:
    torch.manual_seed(5)
    loader = ShufflingLoader(workers)
    for _ in range(3):
        next(loader)
    torch.rand(4)
    checkpoint = save({"loader": loader})
    expected = torch.rand(2).tolist(), [next(loader) for _ in range(5)], torch.rand(2).tolist()
    torch.manual_seed(6)
    other = ShufflingLoader(workers)
    load(checkpoint, {"loader": other})
    assert (torch.rand(2).tolist(), [next(other) for _ in range(5)], torch.rand(2).tolist()) == expected


# What belongs to one rank.


def saved_on(world: int, make: Callable[[int], dict[str, Any]]) -> Checkpoint:
    return save([LiveState(make(rank), rank=rank, world=world).flatten() for rank in range(world)])


def test_each_rank_gets_its_own_back() -> None:
    checkpoint = saved_on(2, lambda rank: {"at": per_rank(10 + rank), "noise": per_rank(torch.full((2,), float(rank)))})
    for rank in range(2):
        box, noise = per_rank(0), torch.zeros(2)
        load(checkpoint, {"at": box, "noise": per_rank(noise)}, rank=rank, world=2)
        assert box.value == 10 + rank
        assert noise.tolist() == [rank, rank]


def test_large_tensors_of_a_rank_are_tensors_of_that_rank() -> None:
    def make(rank: int) -> dict[str, Any]:
        return {"noise": per_rank(torch.full((MIB + rank,), float(rank))), "ema": per_rank(Foreign(w=torch.ones(MIB)))}

    checkpoint = saved_on(2, make)
    assert {"noise@rank0", "noise@rank1", "ema.w@rank0", "ema.w@rank1"} == checkpoint.tensors.keys()
    noise, memory = torch.zeros(MIB + 1), torch.zeros(MIB)
    other = Foreign(w=memory)
    restore, _ = load(checkpoint, {"noise": per_rank(noise), "ema": per_rank(other)}, rank=1, world=2)
    assert restore.unexpected == ()
    assert noise.unique().tolist() == [1.0]
    assert other.loaded["w"] is memory
    with pytest.raises(StateMismatchError, match=rf"\[{MIB}\] here, and torch.float32\[{MIB + 1}\] is to be loaded"):
        load(checkpoint, {"noise": per_rank(torch.zeros(MIB)), "ema": per_rank(other)}, rank=1, world=2)


def test_another_number_of_ranks_is_an_error_by_name_unless_said_otherwise() -> None:
    checkpoint = saved_on(2, lambda rank: {"at": per_rank(10 + rank)})
    with pytest.raises(StateMismatchError, match=r"'at' belongs to each of the 2 ranks.*on_reshard"):
        load(checkpoint, {"at": per_rank(0)}, rank=0, world=3)
    for on_reshard, expected in (("first", 10), ("drop", 0), (lambda saved, rank, world: (saved, rank, world), None)):
        box = per_rank(0, on_reshard)  # type: ignore[arg-type]
        restore, _ = load(checkpoint, {"at": box}, rank=2, world=3)
        assert restore.missing == ()
        assert box.value == (([10, 11], 2, 3) if expected is None else expected)


def test_a_callable_gets_the_large_tensors_of_all_ranks() -> None:
    checkpoint = saved_on(2, lambda rank: {"noise": per_rank(torch.full((MIB,), float(rank)))})
    box = per_rank(torch.zeros(MIB), lambda saved, rank, world: (saved[0] + saved[1]) / 2)
    load(checkpoint, {"noise": box})
    assert box.value.unique().tolist() == [0.5]


def test_plain_objects_that_differ_between_ranks_come_back_to_each() -> None:
    checkpoint = saved_on(2, lambda rank: {"at": 10 + rank, "same": 1})
    state = {"at": 0, "same": 0}
    load(checkpoint, state, rank=1, world=2)
    assert state == {"at": 11, "same": 1}


def test_plain_objects_that_differ_are_refused_by_name_on_other_ranks() -> None:
    checkpoint = saved_on(2, lambda rank: {"at": 10 + rank, "same": 1})
    state = {"at": 0, "same": 0}
    with pytest.raises(StateMismatchError, match=r"^'at' differ between the 2 ranks that saved.*per_rank") as caught:
        load(checkpoint, state)
    assert caught.value.names == ["at"]  # type: ignore[attr-defined]
    assert state == {"at": 0, "same": 0}
    load(checkpoint, {"same": 0}, only=["same"])


@pytest.mark.parametrize("value", [nn.Linear(1, 1), per_rank(3)], ids=["module", "per_rank"])
def test_per_rank_takes_no_modules(value: Any) -> None:
    with pytest.raises(ConfigError, match="per_rank"):
        per_rank(value)
    with pytest.raises(ConfigError, match="on_reshard"):
        per_rank(1, "last")  # type: ignore[arg-type]
