"""Networks as people train them, end to end: max pooling and activations with a valley, exact through all layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attacks import Attack, assert_recovered, attack, gradients_of, photo
from rconv_fast import defenses, invert, rank_analysis
from rconv_fast.layers.pool import MaxPoolRule
from rconv_fast.layers.valley import ValleyRule
from rconv_fast.patterns.robust import GENTLE, MERGED, SHARP
from rconv_fast.walk.reader import build_graph

GREY = photo(16, channels=1)


def norm(channels: int) -> nn.Module:
    """Batch norm in evaluation mode with statistics of its own; half of its channels are turned round."""
    layer = nn.BatchNorm2d(channels).eval()
    nn.init.normal_(layer.running_mean, std=0.2)
    nn.init.uniform_(layer.running_var, 0.5, 2)
    with torch.no_grad():
        layer.weight[::2] *= -1
    return layer


def digit() -> Tensor:
    """A stroke on a flat background."""
    x = torch.zeros(1, 1, 16, 16, dtype=torch.float64)
    x[..., 4:12, 6:9] = photo(16, channels=1)[..., 4:12, 6:9]
    return x


def blocks(*between: Callable[[int], list[nn.Module]]) -> nn.Sequential:
    """Two convolutions of 24 and 48 filters, what stands behind each, one linear layer."""
    first, second = between * (3 - len(between))
    body = nn.Sequential(nn.Conv2d(1, 24, 5, padding=2), *first(24), nn.Conv2d(24, 48, 5, padding=2), *second(48))
    width = body(torch.zeros(1, 1, 16, 16)).numel()
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(width, 10))


NETWORKS = {
    "ReLU, then pool": lambda: blocks(lambda _: [nn.ReLU(), nn.MaxPool2d(2)]),
    "pool, then ReLU": lambda: blocks(lambda _: [nn.MaxPool2d(2), nn.ReLU()]),
    "norm, ReLU, pool": lambda: blocks(lambda c: [norm(c), nn.ReLU(), nn.MaxPool2d(2)]),
    "overlapping": lambda: blocks(lambda _: [nn.ReLU(), nn.MaxPool2d(3, 2, 1)]),
    "adaptive": lambda: blocks(lambda c: [nn.ReLU(), nn.AdaptiveMaxPool2d(8 if c == 24 else (4, 3))]),
    "tanh": lambda: blocks(lambda _: [nn.Tanh(), nn.MaxPool2d(2)]),
}


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS.keys())
def test_max_pools_are_passed(make: Callable[[], nn.Module]) -> None:
    done = assert_recovered(make(), GREY)
    assert sum(bool(layer.patterns) for layer in done.result.layers) == 2
    assert all(layer.proof == "pattern" for layer in done.result.layers if layer.patterns)


def test_flat_backgrounds_tie_as_in_torch() -> None:
    assert_recovered(NETWORKS["ReLU, then pool"](), digit())


@pytest.mark.parametrize("x", [GREY, digit()], ids=["photo", "flat background"])
def test_float32_gradients_are_certified_to_their_own_precision(x: Tensor) -> None:
    done: Attack = attack(NETWORKS["ReLU, then pool"](), x.float(), torch.tensor([1]))
    assert done.result.verified, done.result.summary()
    assert done.psnr > 90


def test_a_search_that_nobody_limits_ends_by_itself_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = NETWORKS["ReLU, then pool"]().double()
    monkeypatch.setattr("rconv_fast.walk.hidden.SEARCH_SECONDS", 0.003)
    result = attack(model, GREY).result
    assert not result.verified
    assert "time_limit=" in result.reason
    monkeypatch.setattr("rconv_fast.walk.hidden.SEARCH_SECONDS", 1e-6)
    assert "one step" in attack(model, GREY).result.reason


def test_an_input_that_no_search_certified_is_corrected_by_a_forward_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(1, 24, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(864, 10))
    monkeypatch.setattr("rconv_fast.patterns.alternation.certify", lambda *_: None)
    monkeypatch.setattr("rconv_fast.walk.hidden.SCHEDULES", (SHARP,))
    monkeypatch.setattr("rconv_fast.patterns.alternation.KICKS", 1)
    done = assert_recovered(model, photo(12, channels=1))
    assert not any(layer.patterns for layer in done.result.layers)


def test_a_stuck_search_is_kicked_out_of_where_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(1, 24, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(864, 10))
    monkeypatch.setattr("rconv_fast.walk.hidden.SCHEDULES", (replace(GENTLE, iterations=6),))
    monkeypatch.setattr("rconv_fast.walk.hidden.can_believe", lambda _: False)
    done = assert_recovered(model, photo(12, channels=1))
    assert "kicks" in done.result.layers[0].patterns


class Functional(nn.Module):
    """Pools and activations as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 24, 5, padding=2)
        self.head = nn.Linear(24 * 12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.max_pool1d(F.relu(self.conv(x)), 2).flatten(1))


def test_functions_and_one_dimension() -> None:
    assert_recovered(Functional(), photo(24, channels=1)[:, :, 12])


@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU(), nn.Mish(), nn.Hardswish()], ids=str)
def test_activations_with_a_valley_are_passed(activation: nn.Module) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 24, 5, 2, 2), activation, nn.Conv2d(24, 32, 3, 2, 1), activation,
        nn.Flatten(), nn.Linear(32 * 16, 32), activation, nn.Linear(32, 10),
    )  # fmt: skip
    assert_recovered(model, photo(16))


def test_a_global_average_is_passed_by_packing() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 32, 5, 2, 2), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(64, 96, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10),
    )  # fmt: skip
    done = assert_recovered(model, photo(16))
    assert "packing" in done.result.layers[0].patterns


def test_a_global_average_of_positions_that_look_alike_says_so() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    )  # fmt: skip
    x = photo(8)
    x[..., 4:] = 0.5
    result = attack(model.double(), x).result
    assert not result.verified
    assert "leave 16 patches open" in result.reason


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.1)], ids=str)
def test_two_convolutions_before_a_pool_are_merged(activation: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rconv_fast.walk.hidden.SCHEDULES", (SHARP,))
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), activation, nn.Conv2d(24, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16 * 25, 10),
    )  # fmt: skip
    counted = rank_analysis(model, (3, 10, 10))
    assert not any(layer.stops for layer in counted)
    assert counted[1].pattern.startswith("2 merged with 0")
    done = assert_recovered(model, photo(10))
    assert done.result.layers[0].name == "0 + 2"
    assert "merged" in done.result.layers[0].patterns


def test_a_merged_search_that_is_stuck_is_kicked_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rconv_fast.walk.hidden.MERGED_SCHEDULES", (replace(MERGED, iterations=1),))
    monkeypatch.setattr("rconv_fast.walk.hidden.can_believe", lambda _: False)
    monkeypatch.setattr("rconv_fast.walk.hidden.SCHEDULES", (replace(SHARP, iterations=1),))
    monkeypatch.setattr("rconv_fast.walk.hidden.NEAR", math.inf)
    monkeypatch.setattr("rconv_fast.patterns.alternation.KICKS", 1)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16 * 25, 10),
    )  # fmt: skip
    result = attack(model.double(), photo(10)).result
    assert "merged, 1 kicks" in result.layers[0].patterns
    assert not result.verified


def test_what_no_pattern_determines_is_said_beforehand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10))
    result = attack(model.double(), photo(16)).result
    assert not result.verified
    assert result.stops_at == "2"
    assert "prove no pattern" in result.reason


def test_rules_read_the_pieces_of_a_forward_run() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.MaxPool2d(3, 2, 1), nn.GELU(), nn.Flatten(), nn.Linear(256, 3)
    ).double()
    graph = build_graph(model, {}, (1, 18, 18), 1)
    x = model[0](photo(18, channels=1)).detach()
    rules = [step.rule for step in graph.steps.values() if step.rule.hidden]
    pool, valley = rules
    assert isinstance(pool, MaxPoolRule)
    assert isinstance(valley, ValleyRule)
    value, index = F.max_pool2d(x, 3, 2, 1, return_indices=True)
    assert torch.equal(pool.piece_of(x), index)
    grad = torch.randn_like(value)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(F.max_pool2d(leaf, 3, 2, 1), leaf, grad)
    assert torch.equal(pool.at(index).pull_gradient(grad, value, 0, x.shape), expected)


@pytest.mark.parametrize("noise", [0.3, 5.0])
def test_noise_as_loud_as_the_gradients_certifies_no_pattern(noise: float) -> None:
    model = nn.Sequential(nn.Conv2d(1, 24, 3, 2, 1), nn.GELU(), nn.Flatten(), nn.Linear(24 * 16, 10)).double()
    x, y = photo(8, channels=1), torch.tensor([1])
    shared = defenses.gaussian(gradients_of(model, x, y), noise, relative=True)
    found = invert(model, shared, x.shape[1:], batch_size=1, labels=[1], time_limit=20)
    assert not found.verified
