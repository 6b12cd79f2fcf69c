"""Suite `scale`: how the cost of a layer grows with the picture, and 224x224 photos of ImageNet one after the other.

The photos are those in foolbox's wheel; without it, crops of scikit-image's.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench import Entry, Rate, Target
from leaks import Leak, judge, leak
from leaks import ours as invert
from pictures import SCENES, crops, samples
from rconv_fast import models
from single_layers import STEMS, layer, ours, record

GROWTH = (32, 64, 128, 256, 512)
N_PHOTOS = 20
# Filters of conv1: the rows per unknown fall with them until the photo is open; fewer photos for the narrow ones.
WIDTHS, N_FEWER = (32, 30, 28, 26, 24, 16, 8), 3


def photos() -> dict[str, Tensor]:
    """Names and pictures (1, 3, 224, 224)."""
    found = samples("imagenet")[:N_PHOTOS]
    if found:
        return {p.name: p.read((3, 224, 224))[None] for p in found}
    return {f"crop {i}": x[None] for i, x in enumerate(crops(4, 224))}


def attacked(name: str, filters: tuple[int, int, int, int], target: Target) -> Leak:
    model = models.cnn4_224("relu", filters=filters, seed=0)
    return leak(model, photos()[name], torch.tensor([3]), target)


def seeded(seed: int, scene: int, target: Target) -> Leak:
    return leak(models.cnn4_224("relu", seed=seed), crops(scene + 1, 224)[scene:], torch.tensor([3]), target)


def entries(target: Target) -> list[Entry | Rate]:
    found: list[Entry | Rate] = [
        Entry(
            f"scale/vgg-stem/{size}/{target.name}",
            lambda size=size: layer(size, *STEMS["vgg"], relu=True).to(target.device),
            ours,
            record=record,
            once=True,
            quick=size == 32,
        )
        for size in GROWTH
    ]
    names = [p.name for p in samples("imagenet")[:N_PHOTOS]] or [f"crop {i}" for i in range(4)]
    for width in WIDTHS:
        some = names if width == WIDTHS[0] else names[:N_FEWER]
        cases = {name: partial(attacked, name, (width, 256, 256, 256), target) for name in some}
        found.append(Rate(f"scale/rate-cnn4_224-{width}/photos/{target.name}", cases, invert, judge, long=True))
    name = f"scale/rate-cnn4_224/5-seeds-3-photos/{target.name}"
    seeds = {
        f"seed {s}, {scene}": partial(seeded, s, i, target) for s in range(5) for i, scene in enumerate(SCENES[:3])
    }
    found.append(Rate(name, seeds, invert, judge, long=True, alone=True))
    return found
