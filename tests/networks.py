"""Small networks drawn from a grammar: strides, kernels, filters, activations, norms, pools, skips, heads, batches."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    nn.ReLU, nn.ReLU, nn.ReLU, lambda: nn.LeakyReLU(0.2), nn.Tanh, nn.Sigmoid, nn.ELU, nn.GELU, nn.SiLU,
)  # fmt: skip


class Skip(nn.Module):
    """``x + f(x)``."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inside(x)


@dataclass(frozen=True)
class Drawn:
    model: nn.Sequential
    input_shape: tuple[int, ...]
    batch_size: int

    @property
    def classes(self) -> int:
        head = self.model[-1]
        assert isinstance(head, nn.Linear)
        return head.out_features

    def __str__(self) -> str:
        layers = [str(layer).replace("kernel_size=", "k").replace("stride=", "s") for layer in self.model]
        return f"batch {self.batch_size} of {self.input_shape}: {', '.join(layers)}"


def draw(seed: int, side: int = 10) -> Drawn:
    """Up to three convolutions with what may stand behind one, and a head of one or two layers; float64."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    channels = first = rng.choice([1, 3])
    layers: list[nn.Module] = []
    size = side
    activation = rng.choice(ACTIVATIONS)
    for _ in range(rng.randint(1, 3)):
        kernel, stride = rng.choice([1, 2, 3, 3, 5]), rng.choice([1, 1, 2, 2, 3])
        padding = rng.choice([0, kernel // 2])
        if size + 2 * padding < kernel:
            break
        filters = rng.choice([4, 8, 16, 32])
        layers.append(nn.Conv2d(channels, filters, kernel, stride, padding))
        channels, size = filters, (size + 2 * padding - kernel) // stride + 1
        if rng.random() < 0.15:
            layers.append(nn.BatchNorm2d(channels).train(rng.random() < 0.5))
        layers.append(activation())
        if rng.random() < 0.2 and size >= 4:
            layers.append(rng.choice([nn.AvgPool2d(2), nn.MaxPool2d(2)]))
            size //= 2
        if rng.random() < 0.1:
            layers.append(nn.Dropout(0.3).train(rng.random() < 0.7))
        if rng.random() < 0.15:
            layers.append(Skip(nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1), activation())))
    if rng.random() < 0.1:
        layers.append(nn.AdaptiveAvgPool2d(1))
        size = 1
    classes = rng.choice([5, 10, 20])
    layers.append(nn.Flatten())
    features = channels * size * size
    if rng.random() < 0.3:
        hidden = rng.choice([16, 64])
        layers += [nn.Linear(features, hidden), activation()]
        features = hidden
    model = nn.Sequential(*layers, nn.Linear(features, classes)).double()
    return Drawn(model, (first, side, side), rng.choice([1, 1, 1, 2, 3, 6]))


def narrow() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 12, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(12, 12, 3, 1, 1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(12 * 16, 12)).double()
