"""Large fully connected layers: nothing is copied whole, and parts are solved as the whole is."""

from __future__ import annotations

import subprocess
import sys

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
    shapes = {"small": torch.Size((2, 2)), "large": torch.Size((KEPT + 1,))}

    def make(name: str, places: slice) -> torch.Tensor:
        made.append(name)
        return torch.zeros(shapes[name].numel())[places]

    tensors = OnDemand(shapes, make)
    assert list(tensors) == ["small", "large"]
    assert "other" not in tensors
    assert not made
    for _ in range(2):
        assert tensors["small"].numel() == 4
        assert tensors["large"].numel() == KEPT + 1
    assert made == ["small", "large", "large"]
    assert tensors["small"].shape == (2, 2)
    assert tensors.part("small", slice(1, 3)).shape == tensors.part("large", slice(1, 3)).shape == (2,)
    assert made == ["small", "large", "large", "large"]
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


# Prints the peak above what the caller holds, the model's size and that of the largest layer in float64, in bytes.
# The small model first: what is imported on the way is no part of it.
MEASURED = """
import resource
import torch
from torch import nn
import rconv_fast


def attack(*sizes):
    layers = [nn.Flatten()]
    for size, next_size in zip(sizes, sizes[1:]):
        layers += [nn.Linear(size, next_size), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    loss = nn.functional.cross_entropy(model(torch.rand(1, sizes[0])), torch.tensor([3]))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    before = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert rconv_fast.invert(model, list(gradients), (sizes[0],)).verified
    after = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    parameters = [p.numel() for p in model.parameters()]
    return after - before, 4 * sum(parameters), 8 * max(parameters)


torch.manual_seed(0)
attack(48, 24, 10)
print(*attack(3072, 4096, 3200, 10))
"""


def test_memory_is_three_times_the_model_and_its_largest_layer_at_most() -> None:
    found = subprocess.run([sys.executable, "-c", MEASURED], check=True, capture_output=True, text=True)
    peak, model, layer = map(int, found.stdout.split())
    assert peak <= 3 * model + layer
