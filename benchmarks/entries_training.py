"""Suite `training`: clients as they train: batch norm and dropout in training mode, local steps, what Adam sends."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rconv_fast
from bench import Outcome, Rate, Target
from leaks import SUCCESS_PSNR, Answer, Leak, judge, ours
from pictures import crops
from rconv_fast.observation import LocalTraining

SGD = LocalTraining(0.1)
# Seconds a case, of a shared machine.
LIMIT = 300.0
UP_TO_CONSTANTS = "batch-norm-up-to-constants/16-two"
# Side of the pictures; filters, kernel, stride and padding of each convolution.
Shape = tuple[int, tuple[tuple[int, int, int, int], ...]]
NETWORKS: dict[str, Shape] = {
    "16-two": (16, ((24, 3, 2, 1), (48, 3, 2, 1))),
    "16-three": (16, ((24, 3, 2, 1), (48, 3, 2, 1), (96, 3, 2, 1))),
    "32-two": (32, ((32, 5, 2, 2), (64, 5, 2, 2))),
    "32-three": (32, ((32, 5, 2, 2), (64, 5, 2, 2), (128, 3, 2, 1))),
}


def network(name: str, seed: int, behind: Callable[[int], list[nn.Module]]) -> nn.Sequential:
    """Convolutions of a shape with `behind` (of so many channels) behind each, and a head; drawn by the seed."""
    torch.manual_seed(seed)
    side, convolutions = NETWORKS[name]
    layers: list[nn.Module] = []
    channels = 3
    for filters, kernel, stride, padding in convolutions:
        layers += [nn.Conv2d(channels, filters, kernel, stride, padding), *behind(filters)]
        channels, side = filters, (side + 2 * padding - kernel) // stride + 1
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * side**2, 10))


def normed(channels: int) -> list[nn.Module]:
    """Batch norm with an affine map as after some training, and ReLU."""
    norm = nn.BatchNorm2d(channels)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias, 0, 0.2)
    return [norm, nn.ReLU()]


def rectified(_: int) -> list[nn.Module]:
    return [nn.ReLU()]


def dropped(_: int) -> list[nn.Module]:
    return [nn.ReLU(), nn.Dropout(0.25)]


def with_dropout(name: str, seed: int) -> nn.Sequential:
    """A quarter dropped behind each convolution, half in front of the head."""
    *layers, head = network(name, seed, dropped)
    return nn.Sequential(*layers, nn.Dropout(0.5), head)


class Block(nn.Module):
    """Two convolutions with batch norm around a skip, the first strided, as torchvision's BasicBlock."""

    def __init__(self, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, filters, 3, stride, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(filters), nn.BatchNorm2d(filters)
        self.second = nn.Conv2d(filters, filters, 3, 1, 1, bias=False)
        self.skip = nn.Sequential()
        if stride > 1:
            self.skip = nn.Sequential(nn.Conv2d(channels, filters, 1, stride, bias=False), nn.BatchNorm2d(filters))

    def forward(self, x: Tensor) -> Tensor:
        inside = self.norm2(self.second(F.relu(self.norm1(self.first(x)))))
        return F.relu(inside + self.skip(x))


def small_resnet(seed: int) -> nn.Sequential:
    """A strided stem, two blocks, the second strided, flattened; for pictures of 16 pixels."""
    torch.manual_seed(seed)
    stem = [nn.Conv2d(3, 32, 5, 2, 2, bias=False), *normed(32)]
    return nn.Sequential(*stem, Block(32, 32, 1), Block(32, 64, 2), nn.Flatten(), nn.Linear(64 * 16, 10))


def batch_of(size: int, side: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures and labels of a seed's own."""
    first = 3 * seed
    return crops(first + size, side)[first:], (torch.arange(size) + seed) % 10


@dataclass(frozen=True)
class Client:
    """Who trains in training mode: the model of a seed, pictures of a side, how; None: only gradients are sent."""

    build: Callable[[int], nn.Module]
    side: int
    size: int = 1
    training: LocalTraining | None = SGD

    def sends(self, seed: int, target: Target) -> Leak:
        """Of one batch, in the precision of the target; the model as it was before."""
        model, (x, labels) = self.build(seed), batch_of(self.size, self.side, seed)
        model, x = model.to(target.device, target.dtype).train(), x.to(target.device, target.dtype)
        before = copy.deepcopy(model.state_dict())
        shared = (gradients if self.training is None else update)(model, x, labels.to(target.device), self.training)
        model.load_state_dict(before)
        return Leak(model, shared, x, labels.to(target.device))


def gradients(model: nn.Module, x: Tensor, labels: Tensor, _: LocalTraining | None) -> dict[str, Tensor]:
    names, values = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(F.cross_entropy(model(x), labels), values), strict=True))


def update(model: nn.Module, x: Tensor, labels: Tensor, training: LocalTraining | None) -> dict[str, Tensor]:
    """Of all steps on the same batch, running statistics too."""
    assert training is not None
    before = copy.deepcopy(model.state_dict())
    optimizer = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[training.optimizer](model.parameters(), training.lr)
    for _ in range(training.steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    model.zero_grad()
    return rconv_fast.gradients_from_update(
        before, model.state_dict(), training.lr, steps=training.steps, optimizer=training.optimizer
    )


def up_to_constants(answer: Answer) -> Outcome:
    """Success: what is called open is open, and is off by as many constants a channel as the notes count.

    A kernel of 3, stride 2 and padding 1 hides one constant a channel, on the even pixels.
    """
    given, found = answer
    if found.inputs is None or found.determined is None:
        return Outcome(False, float("nan"), found.reason)
    even = torch.zeros(given.x.shape[2:], dtype=torch.bool)
    even[::2, ::2] = True
    error = found.inputs - given.x
    channels = error[..., even]
    error[..., even] = channels - channels.mean(dim=2, keepdim=True)
    psnr = -10 * math.log10(max(float(error.square().mean()), 1e-40))
    counted = any(f"exact up to {given.x.shape[1]} constants" in note for note in found.notes)
    named = torch.equal(found.determined, (~even).expand_as(found.determined))
    success = counted and named and psnr >= SUCCESS_PSNR and not found.verified
    return Outcome(success, psnr, "" if success else "; ".join(found.notes), found.verified)


Cases = dict[str, tuple[Client, int]]


def seeds(client: Client, count: int) -> Cases:
    return {f"seed {seed}": (client, seed) for seed in range(count)}


def normed_clients(size: int) -> Cases:
    """Of each network, two seeds; of the largest batch one."""
    clients = {name: Client(partial(network, name, behind=normed), NETWORKS[name][0], size) for name in NETWORKS}
    drawn = range(1 if size == 4 else 2)
    return {f"{name}, seed {seed}": (client, seed) for name, client in clients.items() for seed in drawn}


def entries(target: Target) -> list[Rate]:
    cases = {f"batch-norm-statistics/B{size}": normed_clients(size) for size in (1, 2, 4)}
    dropping = partial(with_dropout, "32-two")
    cases |= {f"dropout/B{size}": seeds(Client(dropping, 32, size), 5) for size in (1, 2)}
    cases["resnet"] = seeds(Client(small_resnet, 16), 5)
    if target.dtype == torch.float64:
        wide, narrow = partial(network, "32-three", behind=normed), partial(network, "16-two", behind=normed)
        plain = partial(network, "16-two", behind=rectified)
        cases["batch-norm-gradients-alone/32-three"] = seeds(Client(wide, 32, training=None), 10)
        cases[UP_TO_CONSTANTS] = seeds(Client(narrow, 16, training=None), 10)
        cases["first-step-of-adam"] = seeds(Client(plain, 16, training=LocalTraining(1e-3, optimizer="adam")), 5)
        for steps in (2, 5):
            cases[f"local-steps/{steps}"] = seeds(Client(plain, 16, training=LocalTraining(1e-2, steps)), 10)
    return [
        Rate(
            f"training/{name}/{target.name}",
            {case: partial(client.sends, seed, target) for case, (client, seed) in given.items()},
            partial(ours, time_limit=LIMIT),
            up_to_constants if name == UP_TO_CONSTANTS else judge,
            long=True,
        )
        for name, given in cases.items()
    ]
