"""Networks drawn from a grammar: none is verified wrongly, none crashes, none runs without end."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks import Attack, gradients_of, photo
from rconv_fast import gradients_from_update, invert

QUICK, SWEEP = range(10), range(300)
# On two cores; an answer that is not found by then is given up by the time limit.
SECONDS = 60.0
# What a verified answer may be off, in dB of a photo: rounding of the arithmetic, amplified by conditioning.
PSNR = {torch.float64: 100.0, torch.float32: 40.0, torch.bfloat16: 20.0}

ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.ReLU, nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.Softplus, nn.GELU, nn.SiLU, nn.ReLU6, nn.Identity,
]  # fmt: skip


class Residual(nn.Module):
    """``x + f(x)``."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


@dataclass(frozen=True)
class Case:
    model: nn.Module
    x: Tensor
    y: Tensor
    loss: str
    dtype: torch.dtype
    options: dict[str, object]
    sent: str = "gradients"

    def function(self, outputs: Tensor, y: Tensor) -> Tensor:
        return getattr(F, {"mse": "mse_loss"}.get(self.loss, self.loss))(outputs, y)


def body(draw: random.Random, channels: int, size: int) -> tuple[list[nn.Module], int]:
    """One to three convolutions, each with what may stand behind one."""
    layers: list[nn.Module] = []
    for _ in range(draw.randint(1, 3)):
        filters = draw.choice([8, 12, 24, 32, 48])
        groups = draw.choice([1, 1, 1, 1, 2]) if channels % 2 == 0 else 1
        kernel, stride = draw.choice([(3, 1), (3, 2), (5, 2), (4, 2), (5, 1), (1, 1)])
        padding = draw.randint(0, kernel // 2)
        mode = draw.choice(["zeros", "zeros", "zeros", "reflect", "circular"]) if padding < size else "zeros"
        bias = draw.random() < 0.8
        layers.append(
            nn.Conv2d(channels, filters, kernel, stride, padding, groups=groups, bias=bias, padding_mode=mode)
        )
        channels = filters
        after: list[nn.Module] = [draw.choice(ACTIVATIONS)()]
        if draw.random() < 0.15:
            after.insert(0, nn.BatchNorm2d(channels).train(draw.random() < 0.3))
        if draw.random() < 0.15:
            after.append(draw.choice([nn.MaxPool2d(2), nn.AvgPool2d(2), nn.MaxPool2d(3, 2, 1)]))
        if draw.random() < 0.1:
            after.append(nn.Dropout(0.3).train(draw.random() < 0.5))
        if draw.random() < 0.1:
            after.append(Residual(nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1), draw.choice(ACTIVATIONS)())))
        layers += after
    return layers, channels


def case(seed: int) -> Case:
    """The case of a seed; one that torch refuses (a pooling of nothing, say) is drawn again."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    while True:
        size, channels, batch = draw.choice([8, 10, 12]), draw.choice([1, 3]), draw.choice([1, 1, 1, 2, 3])
        layers, _ = body(draw, channels, size)
        loss = draw.choice(["cross_entropy"] * 4 + ["mse", "binary_cross_entropy_with_logits"])
        classes = draw.choice([4, 10, 20]) if loss == "cross_entropy" else draw.choice([1, 3])
        if loss == "binary_cross_entropy_with_logits":
            classes = 1
        x = photo(size, batch, channels)
        try:
            features = nn.Sequential(*layers, nn.Flatten())(x.float()).shape[1]
        except (RuntimeError, ValueError):
            continue
        head: list[nn.Module] = [nn.Linear(features, classes, bias=draw.random() < 0.8)]
        if draw.random() < 0.2:
            head = [nn.Linear(features, 40), draw.choice(ACTIVATIONS)(), nn.Linear(40, classes)]
        dtype = draw.choice([torch.float64, torch.float64, torch.float32, torch.bfloat16])
        y = torch.randint(0, classes, (batch,))
        if loss != "cross_entropy":
            y = torch.randn(batch, classes).double() if loss == "mse" else torch.randint(0, 2, (batch, 1)).double()
        options: dict[str, object] = {"batch_size": batch} if draw.random() < 0.3 else {}
        return Case(nn.Sequential(*layers, nn.Flatten(), *head), x, y, loss, dtype, options)


def shared_of(drawn: Case) -> tuple[nn.Module, Mapping[str, Tensor]]:
    """The model as the client has it, and what it sends: of float32 arithmetic, of float64, or rounded to bfloat16."""
    working = torch.float32 if drawn.dtype == torch.float32 else torch.float64
    model, x = drawn.model.to(working), drawn.x.to(working)
    y = drawn.y.to(working) if drawn.y.is_floating_point() else drawn.y
    if drawn.sent != "gradients":
        return model, update_of(model, x, y, drawn)
    before = copy.deepcopy(model.state_dict())
    shared = gradients_of(model, x, y, drawn.function)
    model.load_state_dict(before)
    return model, {name: g.to(drawn.dtype) if drawn.dtype == torch.bfloat16 else g for name, g in shared.items()}


# Learning rate, steps and optimizer of what a client sends instead of gradients.
UPDATES = {"update": (0.1, 1, "sgd"), "two steps": (1e-3, 2, "sgd"), "adam": (1e-3, 1, "adam")}


def update_of(model: nn.Module, x: Tensor, y: Tensor, drawn: Case) -> Mapping[str, Tensor]:
    """The update of a client in the model's mode; the model is left as before it."""
    lr, steps, optimizer = UPDATES[drawn.sent]
    before = copy.deepcopy(model.state_dict())
    own = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer](model.parameters(), lr)
    for _ in range(steps):
        own.zero_grad()
        drawn.function(model(x), y).backward()
        own.step()
    after = copy.deepcopy(model.state_dict())
    model.load_state_dict(before)
    model.zero_grad()
    return gradients_from_update(before, after, lr, steps=steps, optimizer=optimizer)


def training_block(draw: random.Random, channels: int) -> tuple[list[nn.Module], int]:
    """A convolution with norms of the batch and of each sample, dropouts and residuals as they are while training."""
    filters = draw.choice([16, 24, 32, 48])
    kernel, stride, padding = draw.choice([(3, 1, 1), (3, 2, 1), (3, 2, 0), (5, 2, 2), (4, 2, 1)])
    layers: list[nn.Module] = [nn.Conv2d(channels, filters, kernel, stride, padding, bias=draw.random() < 0.6)]
    layers.append(draw.choice([nn.ReLU, nn.ReLU, nn.ReLU, nn.LeakyReLU, nn.Tanh])())
    if draw.random() < 0.7:
        norm = nn.BatchNorm2d(filters, affine=draw.random() < 0.8, momentum=draw.choice([0.1, 0.1, None]))
        each = draw.choice([nn.GroupNorm(4, filters), nn.InstanceNorm2d(filters, affine=True)])
        layers.insert(draw.choice([1, 1, 1, 2]), draw.choice([norm, norm, norm, each]))
    if draw.random() < 0.3:
        layers.append(draw.choice([nn.Dropout(0.25), nn.Dropout(0.5), nn.Dropout2d(0.25)]))
    if draw.random() < 0.15:
        inside = [nn.Conv2d(filters, filters, 3, 1, 1), nn.BatchNorm2d(filters), nn.ReLU()]
        layers.append(Residual(nn.Sequential(*inside)))
    return layers, filters


def training_case(seed: int) -> Case:
    """A client as it trains, and one of the ways in which it sends what it learnt."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    size, channels, batch = draw.choice([8, 10, 12]), draw.choice([1, 3]), draw.choice([1, 1, 2, 2, 3])
    layers, filters = training_block(draw, channels)
    if draw.random() < 0.6:
        layers += training_block(draw, filters)[0]
    model = nn.Sequential(*layers, nn.Flatten())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    features = copy.deepcopy(model).eval()(photo(size, 1, channels).float()).shape[1]
    head: list[nn.Module] = [nn.Linear(features, 10)]
    if draw.random() < 0.3:
        head.insert(0, nn.Dropout(0.5))
    dtype = draw.choice([torch.float64, torch.float64, torch.float32])
    sent = draw.choice(["gradients", "gradients", "update", "update", "update", "two steps", "adam"])
    y = torch.randint(0, 10, (batch,))
    return Case(
        model.append(nn.Sequential(*head)).train(), photo(size, batch, channels), y, "cross_entropy", dtype, {}, sent
    )


POOLS: list[Callable[[], nn.Module]] = [
    lambda: nn.MaxPool2d(2), lambda: nn.MaxPool2d(2), lambda: nn.MaxPool2d(3, 2, 1),
    lambda: nn.MaxPool2d(3, 2, ceil_mode=True),
    lambda: nn.AdaptiveMaxPool2d(4),
]  # fmt: skip
BEHIND = [nn.ReLU, nn.ReLU, nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid]
VALLEYS = [nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish]


def hiding_block(draw: random.Random, channels: int) -> tuple[list[nn.Module], int]:
    """A convolution (or two) and what hides a pattern: a pool on either side of an activation, or a valley."""
    layers: list[nn.Module] = []
    for _ in range(draw.choice([1, 1, 1, 2])):
        filters, kernel = draw.choice([6, 12, 16, 24, 32]), draw.choice([3, 3, 5])
        layers += [nn.Conv2d(channels, filters, kernel, padding=kernel // 2, bias=draw.random() < 0.9), nn.ReLU()]
        channels = filters
    layers.pop()
    if draw.random() < 0.15:
        layers.append(nn.BatchNorm2d(channels).eval())
    if draw.random() < 0.25:
        return [*layers, draw.choice(VALLEYS)()], channels
    behind = [draw.choice(BEHIND)(), draw.choice(POOLS)()]
    return [*layers, *(behind if draw.random() < 0.7 else behind[::-1])], channels


def hiding_case(seed: int) -> Case:
    """A network most of whose layers hide their pattern."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    size, channels, batch = draw.choice([8, 10, 12]), draw.choice([1, 3]), draw.choice([1, 1, 1, 2])
    x = photo(size, batch, channels)
    if draw.random() < 0.3:
        x = torch.where(x > x.mean(), x, 0.0)  # a flat background
    layers, filters = hiding_block(draw, channels)
    if draw.random() < 0.4:
        layers += hiding_block(draw, filters)[0]
    elif draw.random() < 0.2:
        layers = [nn.Conv2d(channels, 64, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    features = nn.Sequential(*layers, nn.Flatten())(x.float()).shape[1]
    dtype = draw.choice([torch.float64, torch.float64, torch.float32])
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 10))
    return Case(model, x, torch.randint(0, 10, (batch,)), "cross_entropy", dtype, {})


def check(drawn: Case, seed: int, limit: float = SECONDS) -> None:
    """A verified answer is the truth, any other one says why, and neither takes for ever."""
    model, shared = shared_of(drawn)
    start = time.perf_counter()
    done = Attack(invert(model, shared, drawn.x.shape[1:], loss=drawn.loss, time_limit=limit, **drawn.options), drawn.x)
    seconds = time.perf_counter() - start
    result = done.result
    asked = f"seed {seed}, {drawn.dtype}, {drawn.loss}, B={len(drawn.x)}, {drawn.sent}"
    described = f"{asked}, {seconds:.0f} s\n{model}\n{result.summary()}"
    if result.verified:
        assert result.inputs.shape == drawn.x.shape, described
        rough = drawn.sent == "adam"  # of seven digits
        assert done.psnr >= PSNR[torch.float32 if rough else drawn.dtype], f"{done.psnr:.0f} dB: {described}"
        if drawn.loss != "mse":
            assert torch.equal(result.labels.reshape(-1).long(), drawn.y[done.match].reshape(-1).long()), described
    else:
        assert result.notes or result.reason, described
    assert seconds < 2 * SECONDS, described


@pytest.mark.parametrize("seed", QUICK)
def test_none_is_verified_wrongly(seed: int) -> None:
    check(case(seed), seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SWEEP)
def test_none_of_many_is_verified_wrongly(seed: int) -> None:
    check(case(1000 + seed), 1000 + seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_none_that_hides_its_patterns_is_verified_wrongly(seed: int) -> None:
    check(hiding_case(2000 + seed), 2000 + seed, limit=SECONDS / 3)


@pytest.mark.parametrize("seed", [pytest.param(s, marks=pytest.mark.slow) if s > 3 else s for s in range(200)])
def test_none_in_training_mode_is_verified_wrongly(seed: int) -> None:
    check(training_case(3000 + seed), 3000 + seed, limit=SECONDS / 3)
