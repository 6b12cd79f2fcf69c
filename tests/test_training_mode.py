"""Clients as they train: batch norm and dropout in training mode, norms of each sample: verified, or what is open."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attacks import Attack, assert_recovered, gradients_of, photo, some_labels
from rconv_fast import gradients_from_update, invert
from rconv_fast.estimate.gradient_map import GradientMap
from rconv_fast.estimate.unrolled import UnrolledMap
from rconv_fast.local_steps import to_middle_weights
from rconv_fast.losses import Loss
from rconv_fast.observation import LocalTraining, SharedGradients

Build = Callable[[], nn.Sequential]


def cnn(*middle: nn.Module, size: int = 8, filters: tuple[int, ...] = (24, 48), bias: bool = True) -> nn.Sequential:
    """Two strided convolutions with `middle` (copies of it, for the right channels) behind each."""
    layers: list[nn.Module] = []
    channels = 3
    for f in filters:
        layers += [nn.Conv2d(channels, f, 3, 2, 1, bias=bias), *(made(layer, f) for layer in middle)]
        channels, size = f, size // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size**2, 10)).double().train()


def made(layer: nn.Module, channels: int) -> nn.Module:
    if not isinstance(layer, nn.BatchNorm2d):
        return copy.deepcopy(layer)
    norm = nn.BatchNorm2d(channels, momentum=layer.momentum, affine=layer.affine)
    norm.track_running_stats = layer.track_running_stats
    if norm.affine:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.2)
    return norm


def trained_on(model: nn.Module, x: Tensor, lr: float = 0.1) -> SharedGradients:
    """The update of one honest step in training mode, as a server gets it; `model` is as before the step."""
    before = copy.deepcopy(model.state_dict())
    optimiser = torch.optim.SGD(model.parameters(), lr)
    F.cross_entropy(model(x), some_labels(len(x))).backward()
    optimiser.step()
    after = copy.deepcopy(model.state_dict())
    model.load_state_dict(before)
    model.zero_grad()
    return gradients_from_update(before, after, lr)


def recovered(model: nn.Module, x: Tensor, shared: SharedGradients) -> Attack:
    done = Attack(invert(model, shared, x.shape[1:]), x)
    assert done.result.verified, done.result.summary()
    assert done.result.determined.all()
    assert torch.equal(done.result.labels, some_labels(len(x))[done.match])
    return done


BATCH_NORMS = {
    "in front of ReLU": lambda: cnn(nn.BatchNorm2d(1), nn.ReLU(), filters=(32,)),
    "without affine": lambda: cnn(nn.BatchNorm2d(1, affine=False), nn.ReLU(), bias=False, filters=(32,)),
    "in front of LeakyReLU": lambda: cnn(nn.BatchNorm2d(1), nn.LeakyReLU(0.2), filters=(32,)),
    "behind ReLU": lambda: cnn(nn.ReLU(), nn.BatchNorm2d(1), filters=(32,)),
    "average over all steps": lambda: cnn(nn.BatchNorm2d(1, momentum=None), nn.ReLU(), filters=(32,)),
}


@pytest.mark.parametrize("batch", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("build", BATCH_NORMS.values(), ids=BATCH_NORMS.keys())
def test_batch_norm_with_the_statistics_that_the_update_holds(build: Build, batch: int) -> None:
    model, x = build(), photo(8, batch)
    buffers = {name: value.clone() for name, value in model.state_dict().items()}
    done = recovered(model, x, trained_on(model, x))
    assert done.psnr > 200
    assert all(torch.equal(value, buffers[name]) for name, value in model.state_dict().items())
    assert model.training


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=pytest.mark.slow) if seed else seed for seed in range(4)])
def test_batch_norm_in_float32_with_the_statistics_that_the_update_holds(seed: int) -> None:
    """Mean and variance are rounded more than the gradients are: the answer is the one that fits all of them."""
    torch.manual_seed(seed)
    model, x = cnn(nn.BatchNorm2d(1), nn.ReLU(), bias=False).float(), photo(8, 2).float()
    assert recovered(model, x, trained_on(model, x)).psnr > 100


@pytest.mark.slow
def test_other_statistics_than_those_of_the_answer_verify_nothing() -> None:
    model, x = cnn(nn.BatchNorm2d(1), nn.ReLU(), filters=(32,)), photo(8)
    shared = trained_on(model, x)
    shared.statistics["1.running_mean"] = shared.statistics["1.running_mean"] + 1e-4
    result = invert(model, shared, x.shape[1:])
    assert not result.verified, result.summary()


def test_batch_norm_from_gradients_alone_up_to_the_offsets_that_it_hides() -> None:
    """A 3x3 kernel of stride 2 and padding 1 hides one constant a channel, on the even pixels."""
    model, x = cnn(nn.BatchNorm2d(1), nn.ReLU()), photo(8)
    result = invert(model, SharedGradients(dict(trained_on(model, x))), x.shape[1:])
    even = torch.zeros(8, 8, dtype=torch.bool)
    even[::2, ::2] = True
    assert result.verdict == "partial"
    assert torch.equal(result.determined, (~even).expand_as(result.determined))
    assert float((result.inputs - x)[..., ~even].abs().max()) < 1e-8
    offsets = (result.inputs - x)[..., even]
    assert float((offsets - offsets.mean(dim=2, keepdim=True)).abs().max()) < 1e-8
    assert any("exact up to 3 constants" in note for note in result.notes), result.notes


def test_batch_norm_from_gradients_alone_where_padding_shows_everything() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 32, 5, 2, 2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 5, 2, 2), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * 4, 10),
    ).double().train()  # fmt: skip
    x = photo(8)
    done = recovered(model, x, SharedGradients(dict(trained_on(model, x))))
    assert done.psnr > 150


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("seed", [pytest.param(seed, marks=pytest.mark.slow) if seed else seed for seed in range(5)])
def test_batch_norm_behind_relus_from_gradients_alone(seed: int, batch: int) -> None:
    """Channels without zeros among them, and channels of nothing else: the bias in front tells them."""
    torch.manual_seed(seed)
    model, x = cnn(nn.ReLU(), nn.BatchNorm2d(1)), photo(8, batch)
    assert recovered(model, x, SharedGradients(dict(trained_on(model, x)))).psnr > 150


def test_one_and_three_axes() -> None:
    line = nn.Sequential(nn.Conv1d(2, 24, 5, 2, 2), nn.BatchNorm1d(24), nn.ReLU(), nn.Flatten(), nn.Linear(24 * 16, 10))
    cube = nn.Sequential(nn.Conv3d(1, 40, 3, 2, 1), nn.BatchNorm3d(40), nn.ReLU(), nn.Flatten(), nn.Linear(40 * 27, 10))
    for model, shape in ((line, (2, 32)), (cube, (1, 6, 6, 6))):
        x = torch.rand(2, *shape, dtype=torch.float64)
        model.double().train()
        assert recovered(model, x, trained_on(model, x)).psnr > 200


class Residual(nn.Module):
    """A stem and two residual blocks, the second strided, as torchvision builds them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 5, 2, 2, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.first = self.branch(32, 32, 1)
        self.second = self.branch(32, 64, 2)
        self.short = nn.Sequential(nn.Conv2d(32, 64, 1, 2, bias=False), nn.BatchNorm2d(64))
        self.head = nn.Linear(64 * 4, 10)

    def branch(self, channels: int, filters: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(channels, filters, 3, stride, 1, bias=False), nn.BatchNorm2d(filters), nn.ReLU(),
            nn.Conv2d(filters, filters, 3, 1, 1, bias=False), nn.BatchNorm2d(filters),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.first(x) + x)
        x = F.relu(self.second(x) + self.short(x))
        return self.head(x.flatten(1))


@pytest.mark.slow
def test_a_small_resnet() -> None:
    model, x = Residual().double().train(), photo(8)
    assert recovered(model, x, trained_on(model, x)).psnr > 200


NORMS = [nn.GroupNorm(4, 24), nn.LayerNorm([24, 8, 8]), nn.InstanceNorm2d(24, affine=True)]
NORMS += [nn.InstanceNorm2d(24, affine=True, track_running_stats=True)]


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_norms_of_each_sample(norm: nn.Module) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 24, 5, 2, 2), norm, nn.ReLU(), nn.Conv2d(24, 48, 3, 2, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(48 * 16, 10),
    ).double().train()  # fmt: skip
    assert_recovered(model, photo(16))


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_norms_of_each_sample_in_a_batch_behind_an_activation_that_hides_nothing(norm: nn.Module) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 24, 5, 2, 2), norm, nn.LeakyReLU(0.2), nn.Conv2d(24, 48, 3, 2, 1), nn.LeakyReLU(0.2),
        nn.Flatten(), nn.Linear(48 * 16, 10),
    ).double().train()  # fmt: skip
    assert_recovered(model, photo(16, 2))


def test_a_norm_of_each_sample_in_a_batch_is_named() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 24, 5, 2, 2), nn.GroupNorm(4, 24), nn.ReLU(), nn.Flatten(), nn.Linear(24 * 64, 10)
    ).double()  # fmt: skip
    x = photo(16, 2)
    result = Attack(invert(model, trained_on(model, x), x.shape[1:]), x).result
    assert (result.verdict, result.stops_at) == ("features", "1")
    assert "GroupNorm" in result.reason


DROPOUTS = {
    "ReLU": lambda: cnn(nn.ReLU(), nn.Dropout(0.25), filters=(40, 60)),
    "Tanh": lambda: cnn(nn.Tanh(), nn.Dropout(0.25)),
    "whole channels": lambda: cnn(nn.LeakyReLU(0.2), nn.Dropout2d(0.25)),
    "before the activation": lambda: cnn(nn.Dropout(0.25), nn.ReLU(), filters=(40, 60)),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("build", DROPOUTS.values(), ids=DROPOUTS.keys())
def test_dropout_in_training_mode(build: Build, batch: int) -> None:
    model = build()
    head = nn.Sequential(*model[:-1], nn.Dropout(0.5), model[-1]).train()
    state = torch.get_rng_state()
    x = photo(8, batch)
    shared = trained_on(head, x)
    after = torch.get_rng_state()
    assert recovered(head, x, shared).psnr > 200
    assert torch.equal(torch.get_rng_state(), after)
    assert not torch.equal(state, after), "the client's own step drew its masks"


def test_dropout_by_function_and_between_fully_connected_layers() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 24, 5, 2, 2)
            self.hidden, self.head = nn.Linear(24 * 64, 64), nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = F.dropout(F.relu(self.conv(x)), 0.25, self.training).flatten(1)
            return self.head(F.dropout(F.relu(self.hidden(x)), 0.5, self.training))

    assert_recovered(Model().double().train(), photo(16))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Tanh(), nn.LeakyReLU(0.2)], ids=str)
def test_dropout_in_float32(activation: nn.Module, batch: int) -> None:
    """Zeros that two samples share are exact, those of one are as small as the rounding: both are zeros."""
    layers = list(cnn(activation, nn.Dropout(0.25), filters=(40, 60)))
    model, x = nn.Sequential(*layers[:-1], nn.Dropout(0.5), layers[-1]).float(), photo(8, batch).float()
    assert recovered(model, x, trained_on(model, x)).psnr > 90


def stepped(
    model: nn.Module, x: Tensor, steps: int, lr: float = 1e-3, momentum: float = 0.0, weight_decay: float = 0.0
) -> SharedGradients:
    """The update of several steps on the same data; `model` is as before them."""
    before = copy.deepcopy(model.state_dict())
    optimiser = torch.optim.SGD(model.parameters(), lr, momentum=momentum, weight_decay=weight_decay)
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(model(x), some_labels(len(x))).backward()
        optimiser.step()
    after = copy.deepcopy(model.state_dict())
    model.load_state_dict(before)
    return gradients_from_update(before, after, lr, steps=steps, momentum=momentum, weight_decay=weight_decay)


@pytest.mark.parametrize(
    ("activation", "steps", "momentum", "weight_decay"),
    [(nn.ReLU(), 2, 0.0, 0.0), pytest.param(nn.Tanh(), 3, 0.9, 0.01, marks=pytest.mark.slow)],
    ids=str,
)
def test_several_steps_on_one_sample(activation: nn.Module, steps: int, momentum: float, weight_decay: float) -> None:
    """Verified where the whole update is reproduced, step by step; and called experimental."""
    model, x = cnn(activation), photo(8)
    before = copy.deepcopy(model.state_dict())
    done = recovered(model, x, stepped(model, x, steps, momentum=momentum, weight_decay=weight_decay))
    assert done.psnr > 200
    assert any(f"experimental: all {steps} local steps" in note for note in done.result.notes)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_the_first_step_of_adam(optimizer: str) -> None:
    """Its weights hold the gradients to seven digits in float64."""
    model, x = cnn(nn.ReLU()), photo(8)
    assert recovered(model, x, adam_step(model, x, optimizer)).psnr > 100


def test_the_first_step_of_adam_in_float32_shows_the_label() -> None:
    model, x = cnn(nn.ReLU()).float(), photo(8).float()
    result = invert(model, adam_step(model, x, "adam"), x.shape[1:])
    assert result.verdict == "nothing"
    assert f"classes [{int(some_labels(1))}] are in the batch" in result.reason


def adam_step(model: nn.Module, x: Tensor, optimizer: str) -> SharedGradients:
    before = copy.deepcopy(model.state_dict())
    F.cross_entropy(model(x), some_labels(len(x))).backward()
    {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer](
        model.parameters(), 1e-3, weight_decay=0.01
    ).step()
    after = copy.deepcopy(model.state_dict())
    model.load_state_dict(before)
    model.zero_grad()
    return gradients_from_update(before, after, 1e-3, optimizer=optimizer, weight_decay=0.01)


@pytest.mark.slow
def test_steps_that_no_one_sample_explains_are_named_and_not_verified() -> None:
    model, x = cnn(nn.LeakyReLU(0.2), filters=(8,)), photo(8, 2)
    shared = stepped(model, x, 2, lr=0.1)
    for options in ({}, {"batch_size": 2}):
        result = invert(model, shared, x.shape[1:], time_limit=20, **options)
        assert not result.verified, result.summary()
        assert any("2 local steps" in note for note in result.notes)
    assert any("cannot be told apart" in note for note in result.notes)


def test_steps_through_norms_in_training_mode_are_not_unrolled_and_say_so() -> None:
    model, x = cnn(nn.BatchNorm2d(1), nn.ReLU(), filters=(8,)), photo(8)
    result = invert(model, stepped(model, x, 2), x.shape[1:], time_limit=20)
    assert not result.verified
    assert any("training mode" in note and "not unrolled" in note for note in result.notes), result.notes


def test_steps_on_several_samples_are_not_read_as_one_sample() -> None:
    """Neither a batch size nor a label is claimed of what no one sample explains, nor against a given label."""
    model, x = cnn(nn.LeakyReLU(0.2), filters=(8,)), photo(8, 2)
    result = invert(model, stepped(model, x, 2, lr=0.1), x.shape[1:], time_limit=2)
    assert not result.verified
    assert result.batch_size != 1
    one = invert(model, stepped(model, x[:1], 2), x.shape[1:], labels=[int(some_labels(1)) + 1], time_limit=2)
    assert not one.verified


def test_an_update_that_is_reproduced_but_not_proven_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = cnn(nn.ReLU()), photo(8)
    monkeypatch.setattr("rconv_fast.unrolled._proof", lambda *_: None)
    result = invert(model, stepped(model, x, 2), x.shape[1:])
    assert not result.verified
    assert float((result.inputs - x).abs().max()) < 1e-8
    assert any("is reproduced; that no other input does so was not shown" in note for note in result.notes)
    assert not any("miss the gradients" in note for note in result.notes)


def test_unrolled_steps_are_those_of_torchs_sgd() -> None:
    """At the true input they miss nothing, and the products with their derivative are those of differences."""
    model, x = cnn(nn.ReLU(), filters=(6,)), photo(8)
    shared = stepped(model, x, 3, momentum=0.9, weight_decay=0.01)
    sigma = {name: g.square().mean().sqrt() for name, g in shared.items()}
    plain = GradientMap.read(model, Loss("cross_entropy"), some_labels(1), shared, sigma, x.shape)
    problem = UnrolledMap(**vars(plain), training=shared.training)
    assert max(float(part.detach().abs().max()) for part in problem.residual(x)) < 1e-8
    held = problem.held({name: (z > 0).to(z) for name, z in problem.kink_inputs(x).items()})
    direction = torch.randn_like(x)
    found = held.at(x).forward(direction)
    near, far = held.residual(x - 1e-6 * direction), held.residual(x + 1e-6 * direction)
    for part, a, b in zip(found, near, far, strict=True):
        torch.testing.assert_close(part, (b - a).detach() / 2e-6, atol=1e-6, rtol=1e-5)


def test_sides_tied_over_the_steps_are_those_of_the_run_and_move_together() -> None:
    """At the run's own shares nothing changes, also where an activation changes its side between two steps."""
    model, x = cnn(nn.ReLU(), filters=(32,)), photo(8, 1)
    seen = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    training = LocalTraining(0.3, 4)
    read = GradientMap.read(model, Loss(), some_labels(1), seen, seen, x.shape)
    whole = UnrolledMap(**vars(read), training=training)
    inputs = whole.kink_inputs(x)
    tied = whole.tied(inputs)
    shares = {name: (z > 0).to(z).mean(0) for name, z in tied.of_each().items()}
    assert any(bool(((d > 0) & (d < 1)).any()) for d in shares.values())
    held = tied.held(shares)
    for name, z in inputs.items():
        number, _, activation = name.partition(":")
        assert torch.equal(held.bits[int(number)][activation], (z > 0).to(z))
    assert all(torch.equal(a, b) for a, b in zip(held.residual(x), whole.residual(x), strict=True))
    free = {name: d.clone().requires_grad_() for name, d in shares.items()}
    total = sum(side.sum() for bits in tied.held(free).bits for side in bits.values())
    for slope in torch.autograd.grad(total, list(free.values())):
        assert bool((slope == training.steps).all())


def test_the_mean_gradient_nearly_belongs_to_the_weights_half_way() -> None:
    start, x = cnn(nn.Tanh()), photo(8)
    shared = stepped(start, x, 3, weight_decay=0.01)
    middle = copy.deepcopy(start)
    to_middle_weights(middle, shared)

    def miss(model: nn.Module) -> float:
        found = gradients_of(model, x)
        return max(float((found[name] - g).norm() / g.norm()) for name, g in shared.items())

    assert miss(middle) < 0.05 * miss(start)
