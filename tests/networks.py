"""Small networks drawn from a grammar: strides, kernels, filters, activations, averages, batches, heads."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import nn

ACTIVATIONS = (nn.ReLU, nn.ReLU, nn.ReLU, lambda: nn.LeakyReLU(0.2), nn.Tanh, nn.Sigmoid, nn.ELU)


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
    """Up to three convolutions and one linear layer, float64."""
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
        layers += [nn.Conv2d(channels, filters, kernel, stride, padding), activation()]
        channels, size = filters, (size + 2 * padding - kernel) // stride + 1
        if rng.random() < 0.1 and size >= 4:
            layers.insert(-1, nn.AvgPool2d(2))
            size //= 2
    classes = rng.choice([5, 10, 20])
    layers += [nn.Flatten(), nn.Linear(channels * size * size, classes)]
    model = nn.Sequential(*layers).double()
    return Drawn(model, (first, side, side), rng.choice([1, 1, 1, 2, 3, 6]))
