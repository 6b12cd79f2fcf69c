"""Suite `trained`: networks trained for a while on digits, since published attacks are shown on fresh ones."""

from __future__ import annotations

from copy import deepcopy
from functools import lru_cache, partial

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from bench import Rate, Target
from leaks import Leak, judge, leak, ours

EPOCHS = (0, 1, 5)
N_DIGITS = 20
NETWORKS = ("relu", "leaky_relu", "mlp")


@lru_cache
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits (1797, 1, 8, 8) in [0, 1], and their labels."""
    found = load_digits()
    return torch.from_numpy(found.images / 16)[:, None], torch.from_numpy(found.target).long()


def convolutions(activation: str) -> nn.Sequential:
    act = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU}[activation]
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, 1, 1), act(), nn.Conv2d(32, 64, 3, 2, 1), act(), nn.Flatten(), nn.Linear(64 * 16, 10)
    )


def perceptron() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 10)
    )


@lru_cache
def network(epochs: int, kind: str) -> nn.Sequential:
    """Convolutions with an activation, or an MLP; trained by SGD in float64 on all digits but the last hundred."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = (perceptron() if kind == "mlp" else convolutions(kind)).double()
    x, y = digits()
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(epochs):
        order = torch.randperm(len(x) - 100, generator=generator)
        for rows in order.split(32):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimiser.step()
    return model


def attacked(epochs: int, kind: str, index: int, target: Target) -> Leak:
    """The gradient of one digit that was not trained on, back-propagated in the precision of the target."""
    x, y = digits()
    one = slice(len(x) - 1 - index, len(x) - index)
    return leak(deepcopy(network(epochs, kind)), x[one], y[one], target, arithmetic=target.dtype)


def entries(target: Target) -> list[Rate]:
    return [
        Rate(
            f"trained/digits-{kind}/{epochs}-epochs/{target.name}",
            {f"digit {i}": partial(attacked, epochs, kind, i, target) for i in range(N_DIGITS)},
            ours,
            judge,
            quick=epochs == 0 and kind == "relu",
        )
        for kind in NETWORKS
        for epochs in EPOCHS
    ]
