"""A step that the Checkpointer saved, read from the format alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from dscheck import Checkpointer
from tests.manifest.plain_reader import read


@pytest.mark.filterwarnings("ignore:dscheck:RuntimeWarning")
def test_the_plain_reader_reads_what_the_checkpointer_saved(tmp_path: Path) -> None:
    """format F3, F21, F29, F54, F93, F94, F95, F97"""
    model = torch.nn.Sequential(torch.nn.Linear(30, 90, dtype=torch.bfloat16), torch.nn.Linear(90, 7))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    model[0](torch.ones(2, 30, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    state = {"model": model, "optimizer": optimizer, "milestones": Counter({80: 1, 160: 2}), "at": (1, float("inf"))}
    with Checkpointer(tmp_path, state) as ckpt:
        ckpt.save(10).wait(60)
        expected = {f"model.{name}": value.clone() for name, value in model.state_dict().items()}
        expected["optimizer.state.exp_avg.model.0.weight"] = optimizer.state[model[0].weight]["exp_avg"].clone()

    found = read(tmp_path)
    assert found.record["step"] == 10
    for name, value in expected.items():
        dtype, array = found.tensors[name]
        assert (f"torch.{dtype}", array.shape) == (str(value.dtype), tuple(value.shape))
        assert array.tobytes() == value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    assert found.ours == [{"milestones": Counter({80: 1, 160: 2}), "at": (1, float("inf"))}]
    assert found.options[0]["optimizer"]["model.0.weight"]["lr"] == 0.25
    assert found.mine[0]["dscheck.rng"]["torch"] == torch.get_rng_state().numpy().tobytes()
