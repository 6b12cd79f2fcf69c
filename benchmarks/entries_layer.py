"""Suite `layer`: the input of one convolution of a 224x224 photo, beside the obvious recipe."""

from __future__ import annotations

from functools import partial

from bench import Entry, Rate, Target
from single_layers import STEMS, judge, layer, ours, record
from single_layers_others import cupy_lsmr, plain

SEEDS = range(10)


def entries(target: Target) -> list[Entry | Rate]:
    others = {"plain float64 Jacobi-CG": plain}
    if target.device != "cpu":
        others["plain cupy: lsmr on both matrices"] = cupy_lsmr
    sizes = {f"{name}-stem": partial(layer, 224, *shape, relu=True) for name, shape in STEMS.items()}
    sizes["square-3-12-k5-s2"] = partial(layer, 224, 12, 5, 2, 2, relu=False)
    sizes["small-stem"] = partial(layer, 32, *STEMS["vgg"], relu=True)
    square = {
        f"seed {seed}": lambda seed=seed: layer(64, 12, 5, 2, 2, relu=False, seed=seed).to(target.device)
        for seed in SEEDS
    }
    rate = Rate(f"layer/rate-square-3-12-k5-s2/64/{target.name}", square, ours, judge)
    return [rate] + [
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
