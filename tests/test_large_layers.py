"""Large fully connected layers: nothing is copied whole, and parts are solved as the whole is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attacks import gradients_of
from rconv_fast import invert
from rconv_fast.layers import conv
from rconv_fast.on_demand import KEPT, OnDemand
from rconv_fast.rounding import rounded_to
from rconv_fast.solve.phases import solve as phases


def test_tensors_on_demand_are_made_when_asked_for_and_small_ones_once() -> None:
    made: list[str] = []
    sizes = {"small": 4, "large": KEPT + 1}

    def make(name: str) -> torch.Tensor:
        made.append(name)
        return torch.zeros(sizes[name])

    tensors = OnDemand(sizes, make)
    assert list(tensors) == ["small", "large"]
    assert "other" not in tensors
    assert not made
    for _ in range(2):
        assert tensors["small"].numel() == 4
        assert tensors["large"].numel() == KEPT + 1
    assert made == ["small", "large", "large"]
    with pytest.raises(KeyError):
        tensors["other"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_the_narrowest_type_that_holds_all_values(dtype: torch.dtype) -> None:
    values = torch.linspace(0.1, 1, 50, dtype=torch.float64).to(dtype)
    for stored in (dtype, torch.float64):
        assert rounded_to([None, values.to(stored)]) == dtype


@pytest.mark.parametrize("batch", [1, 3])
def test_layers_solved_in_parts_are_solved_as_one(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(batch)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(108, 90), nn.ReLU(), nn.Linear(90, 70), nn.LeakyReLU(), nn.Linear(70, 12)
    ).double()
    x, y = torch.rand(batch, 3, 6, 6, dtype=torch.float64), torch.arange(batch)
    shared = gradients_of(model, x, y)
    whole = invert(model, shared, x.shape[1:])
    for module in (conv, phases):
        monkeypatch.setattr(module, "TOGETHER", 500)
    parts = invert(model, shared, x.shape[1:])
    assert whole.verified
    assert parts.verified
    torch.testing.assert_close(parts.inputs, whole.inputs, rtol=0, atol=1e-11)
    for one, other in zip(parts.layers, whole.layers, strict=True):
        assert (one.rows, one.rank, one.proof) == (other.rows, other.rank, other.proof)
        assert one.residual == pytest.approx(other.residual, rel=100, abs=1e-13)
