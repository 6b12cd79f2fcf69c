"""Suite `invert`: whole attacks on one photo, the paper's networks and larger ones, and how often they succeed."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from bench import Entry, Rate, Target
from leaks import Leak, facts, judge, leak, ours
from pictures import crops, face, photo
from rconv_fast import models
from single_layers import layers_of
from single_layers_others import prototype

LABEL = 7
SEEDS = range(10)
ACTIVATIONS = ("relu", "leaky_relu", "sigmoid", "tanh")
# The networks whose answer depends on the seed (dead filters, a square system), and those that users build.
RATED = (
    ("lenet_o", "relu"),
    ("lenet_o", "sigmoid"),
    ("lenet_all_relu", "relu"),
    ("cnn6_o", "relu"),
    ("cnn6_o", "sigmoid"),
    ("cnn3", "relu"),
)


def attack(network: str, activation: str, target: Target, seed: int = 0) -> Leak:
    model = models.MODELS[network](activation, seed=seed)
    single = model[-1].out_features == 1
    loss = "binary_cross_entropy_with_logits" if single else "cross_entropy"
    return leak(model, face(), torch.tensor([1 if single else LABEL % model[-1].out_features]), target, loss)


def rated(network: str, activation: str, target: Target, n: int = 5) -> Rate:
    """Ten seeds of the parameters with one photo, then more photos with the first seed."""
    cases: dict[str, Any] = {f"seed {s}": partial(attack, network, activation, target, s) for s in SEEDS}
    for i in range(1, n):
        model = partial(models.MODELS[network], activation, seed=0)
        cases[f"crop {i}"] = lambda i=i, model=model: leak(model(), crops(n)[i : i + 1], torch.tensor([LABEL]), target)
    return Rate(f"invert/rate-{network}/{activation}/{target.name}", cases, ours, judge)


def photo_224(target: Target) -> Leak:
    """A photo behind the all-ReLU network of four strided layers."""
    return leak(models.cnn4_224("relu", seed=0), photo(224), torch.tensor([3]), target)


def entries(target: Target) -> list[Entry | Rate]:
    cases = [("lenet_o", name) for name in ACTIVATIONS]
    # With seed 0 so many filters of lenet_all_relu are dead that conv3 has equations of rank 1211 for 1408 values.
    cases += [("lenet_all_relu", "relu"), ("cnn6", "leaky_relu"), ("cnn3", "relu")]
    found: list[Entry | Rate] = [
        Entry(
            f"invert/{network}/{activation}/{target.name}",
            partial(attack, network, activation, target, 1 if network == "lenet_all_relu" else 0),
            ours,
            record=facts,
            quick=(network, activation) == ("lenet_o", "relu"),
            on_cpu=True,
        )
        for network, activation in cases
    ]
    found.append(
        Entry(
            f"invert/cnn4_224/relu/{target.name}",
            partial(photo_224, target),
            ours,
            {"the prototype's recipe, given exact data": lambda given: prototype(layers_of(given.model, given.x))},
            record=facts,
            once=True,
            on_cpu=True,
        )
    )
    return found + [rated(*case, target) for case in RATED]
