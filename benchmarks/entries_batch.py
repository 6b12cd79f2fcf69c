"""Suite `batch`: cost and accuracy from 1 to 16 samples that share one gradient."""

from __future__ import annotations

from functools import partial

import torch
from skimage import data
from skimage.transform import resize
from torch import nn

from bench import Entry, Rate, Target
from leaks import Leak, facts, judge, leak, ours
from pictures import crops
from rconv_fast import models

SIZES = (1, 2, 4, 8, 12, 16)
SEEDS = range(10)


def network(activation: str, filters: int, seed: int = 0) -> nn.Sequential:
    """Three convolutions of `filters`, twice and four times as many, and a head of 100 classes."""
    act = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU}[activation]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, filters, 5, 2, 2),
            act(),
            nn.Conv2d(filters, 2 * filters, 5, 2, 2),
            act(),
            nn.Conv2d(2 * filters, 4 * filters, 3, 2, 1),
            act(),
            nn.Flatten(),
            nn.Linear(64 * filters, 100),
        ).double()


def batch(activation: str, filters: int, size: int, target: Target, seed: int = 0) -> Leak:
    return leak(network(activation, filters, seed), crops(size), torch.arange(size) * 7 % 100, target)


def pair_224(target: Target) -> Leak:
    """Two photos of 224 pixels through a network wide enough for them."""
    model = models.cnn4_224("relu", filters=(32, 384, 448, 512), seed=0)
    pictures = [resize(picture, (224, 224), anti_aliasing=True) for picture in (data.astronaut(), data.coffee())]
    x = torch.stack([torch.from_numpy(p).permute(2, 0, 1) for p in pictures])
    return leak(model, x, torch.tensor([3, 7]), target)


def entries(target: Target) -> list[Entry | Rate]:
    cases = [("leaky_relu", 32, b) for b in SIZES] + [("relu", 64, b) for b in SIZES]
    cases += [("relu", 32, 4), ("relu", 44, 8)]
    found: list[Entry | Rate] = [
        Entry(
            f"batch/{activation}-{filters}/{size}/{target.name}",
            partial(batch, activation, filters, size, target),
            ours,
            record=facts,
            once=True,
            quick=size == 1,
            long=size > 12 or (activation, size) == ("leaky_relu", 12),
            on_cpu=size == 8,
        )
        for activation, filters, size in cases
    ]
    found.append(
        Entry(
            f"batch/relu-224-pixels/2/{target.name}",
            partial(pair_224, target),
            ours,
            record=facts,
            once=True,
            long=True,
        )
    )
    seeds = {f"seed {s}": partial(batch, "relu", 64, 4, target, s) for s in SEEDS}
    return [*found, Rate(f"batch/rate-relu-64/4/{target.name}", seeds, ours, judge)]
