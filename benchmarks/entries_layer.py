"""Suite `layer`: the input of one convolution of a 224x224 photo, beside the obvious recipe."""

from __future__ import annotations

from functools import partial

from bench import Entry, Rate, Target
from single_layers import STEMS, Layer, judge, layer, ours, record
from single_layers_others import cupy_lsmr, plain

# Pixels of the square layer's photo, and seeds.
SQUARE = {64: 10, 128: 20, 224: 8}


def square(size: int, seed: int, target: Target) -> Layer:
    return layer(size, 12, 5, 2, 2, relu=False, seed=seed).to(target.device)


def entries(target: Target) -> list[Entry | Rate]:
    others = {"plain float64 Jacobi-CG": plain}
    if target.device != "cpu":
        others["plain cupy: lsmr on both matrices"] = cupy_lsmr
    sizes = {f"{name}-stem": partial(layer, 224, *shape, relu=True) for name, shape in STEMS.items()}
    sizes["square-3-12-k5-s2"] = partial(layer, 224, 12, 5, 2, 2, relu=False)
    sizes["small-stem"] = partial(layer, 32, *STEMS["vgg"], relu=True)
    rates = [
        Rate(
            f"layer/rate-square-3-12-k5-s2/{size}/{target.name}",
            {f"seed {seed}": partial(square, size, seed, target) for seed in range(seeds)},
            ours,
            judge,
            long=size > 64,
            alone=size > 64,
        )
        for size, seeds in SQUARE.items()
    ]
    return rates + [
        Entry(
            f"layer/{name}/{'32' if name == 'small-stem' else '224'}/{target.name}",
            lambda make=make: make().to(target.device),
            ours,
            others,
            record=record,
            once=name != "small-stem",
            quick=name == "small-stem",
            long=name in ("alexnet-stem", "convnext-stem", "square-3-12-k5-s2"),
            on_cpu=name == "resnet-stem",
        )
        for name, make in sizes.items()
    ]
