"""Small networks that several tests share."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks import photo


def demo(activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """The network of the demo and of method.md, all ReLU."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 5, 2, 2), activation(),
        nn.Conv2d(32, 64, 5, 2, 2), activation(),
        nn.Conv2d(64, 128, 3, 2, 1), activation(),
        nn.Flatten(), nn.Linear(2048, 100),
    )  # fmt: skip


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 24, 5, 2, 2), nn.ReLU(), nn.Conv2d(24, 48, 3, 1, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(48 * 36, 10),
    ).double()  # fmt: skip


def grey(activation: Callable[[], nn.Module]) -> nn.Sequential:
    """Two strided convolutions and twelve classes, for one channel of 12 x 12."""
    return nn.Sequential(
        nn.Conv2d(1, 24, 5, stride=2, padding=2),
        activation(),
        nn.Conv2d(24, 32, 3, stride=2, padding=1),
        activation(),
        nn.Flatten(),
        nn.Linear(32 * 9, 12),
    ).double()


X = photo(12)
SHAPE = (3, 12, 12)


class Residual(nn.Module):
    """A residual block with batch norm behind a strided stem; its skip is the identity or a projection."""

    def __init__(self, projection: bool, bias: bool = True) -> None:
        super().__init__()
        width = 80 if projection else 48
        self.stem = nn.Conv2d(3, 48, 5, 2, 2, bias=bias)
        self.norm0 = nn.BatchNorm2d(48)
        self.conv1 = nn.Conv2d(48, 64, 3, 2 if projection else 1, 1, bias=bias)
        self.norm1 = nn.BatchNorm2d(64)
        self.conv2 = nn.Conv2d(64, width, 3, 1, 1, bias=bias)
        self.norm2 = nn.BatchNorm2d(width)
        self.skip = nn.Conv2d(48, width, 1, 2) if projection else nn.Identity()
        self.conv3 = nn.Conv2d(width, 128, 3, 2, 1)
        self.head = nn.Linear(128 * (16 if projection else 64), 20)
        for norm in (self.norm0, self.norm1, self.norm2):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm0(self.stem(x)))
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        x = F.relu(y + self.skip(x))
        return self.head(F.relu(self.conv3(x)).flatten(1))


SIZE = 12
CLASSES = 10


class Network(nn.Module):
    """Two wide convolutions and a linear layer; the forward is what the tests vary."""

    def __init__(self, forward: Callable[..., Tensor] | None = None, **modules: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 5, 2, 2)
        self.conv2 = nn.Conv2d(24, 48, 3, 1, 1)
        self.fc = nn.Linear(48 * 36, CLASSES)
        for name, module in modules.items():
            setattr(self, name, module)
        self.written = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.written(self, x)


def functional(net: Network, x: Tensor) -> Tensor:
    x = F.relu(net.conv1(x))
    x = torch.relu(net.conv2(x))
    return net.fc(torch.flatten(x, 1))
