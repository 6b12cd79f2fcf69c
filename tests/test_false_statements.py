"""What is not so is never verified: a label, a learning rate or a loss stated wrongly, gradients of no one picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rconv_fast import SharedGradients, invert
from small_networks import grey

NOISES = (1e-6, 1e-4, 1e-3, 1e-2)
ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid)
SHAPE, CLASSES = (1, 12, 12), 12
TRIES = 50  # of each kind at each noise: 200 at each noise in all

# Seed 3 is a draw whose noise was once taken for a second sample.
QUICK = {(0, 1e-3), (3, 1e-3)}
CASES = [
    pytest.param(seed, noise, marks=[] if (seed, noise) in QUICK else [pytest.mark.slow])
    for seed in range(TRIES)
    for noise in NOISES
]

Gradients = dict[str, Tensor]


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return grey(ACTIVATIONS[seed % len(ACTIVATIONS)])


def gradients(model: nn.Module, label: Tensor) -> Gradients:
    """Of a picture of its own."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    x = torch.rand(1, *SHAPE, dtype=torch.float64)
    return dict(zip(names, torch.autograd.grad(F.cross_entropy(model(x), label), parameters), strict=True))


def with_noise(found: Gradients, noise: float) -> SharedGradients:
    """Relative to each tensor's root mean square, and told."""
    sigma = {name: noise * float(g.square().mean().sqrt()) for name, g in found.items()}
    return SharedGradients({n: g + sigma[n] * torch.randn_like(g) for n, g in found.items()}, noise=sigma)


Case = tuple[Gradients, dict[str, Any]]


def wrong_label(_model: nn.Module, found: Gradients, label: Tensor) -> Case:
    return found, {"labels": (label + 1) % CLASSES}


def wrong_learning_rate(_model: nn.Module, found: Gradients, _label: Tensor) -> Case:
    return {name: 2 * g for name, g in found.items()}, {}


def wrong_loss(_model: nn.Module, found: Gradients, _label: Tensor) -> Case:
    return found, {"loss": "mse"}


def wrong_picture(model: nn.Module, found: Gradients, label: Tensor) -> Case:
    return found | {"0.weight": gradients(model, label)["0.weight"]}, {}


@pytest.mark.parametrize(("seed", "noise"), CASES)
@pytest.mark.parametrize("wrong", [wrong_label, wrong_learning_rate, wrong_loss, wrong_picture])
def test_a_false_statement_is_never_verified(wrong: Callable[..., Case], seed: int, noise: float) -> None:
    model, label = network(seed), torch.tensor([seed % CLASSES])
    stated, options = wrong(model, gradients(model, label), label)
    assert not invert(model, with_noise(stated, noise), SHAPE, **options).verified


@pytest.mark.parametrize(("seed", "noise"), CASES)
def test_a_true_statement_is_verified(seed: int, noise: float) -> None:
    """So that the refusals above say something."""
    model, label = network(seed), torch.tensor([seed % CLASSES])
    assert invert(model, with_noise(gradients(model, label), noise), SHAPE, labels=label).verified
