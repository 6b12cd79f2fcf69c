"""Suite `noise`: how often, and how nearly, a photo comes back from gradients with noise or behind a defence."""

from __future__ import annotations

from functools import partial

import torch

from bench import Rate, Target
from leaks import Leak, judge, leak, ours
from pictures import crops
from rconv_fast import defenses, models
from rconv_fast.observation import SharedGradients

SIGMAS = (1e-6, 1e-4, 1e-3, 1e-2)
FAINT = 1e-6  # above it, and behind a rounding to 16 bits, a photo takes minutes
NETWORKS = (("lenet_o", "leaky_relu"), ("cnn3", "relu"))
N_PHOTOS = 4


def noisy(network: str, activation: str, sigma: float, index: int, target: Target) -> Leak:
    """Gaussian noise relative to each tensor's root mean square, which the attacker is told."""
    model = models.MODELS[network](activation, seed=index)
    given = leak(model, crops(N_PHOTOS)[index : index + 1], torch.tensor([index]), target)
    generator = torch.Generator().manual_seed(index)
    given.gradients = defenses.gaussian(SharedGradients(given.gradients), sigma, relative=True, generator=generator)
    return given


def rounded(network: str, activation: str, dtype: torch.dtype, index: int, target: Target) -> Leak:
    model = models.MODELS[network](activation, seed=index)
    given = leak(model, crops(N_PHOTOS)[index : index + 1], torch.tensor([index]), target)
    given.gradients = defenses.quantise(SharedGradients(given.gradients), dtype)
    return given


def entries(target: Target) -> list[Rate]:
    if target.dtype != torch.float64:
        return []
    found = []
    for network, activation in NETWORKS:
        where = f"{network}-{activation}"
        for sigma in SIGMAS:
            cases = {f"photo {i}": partial(noisy, network, activation, sigma, i, target) for i in range(N_PHOTOS)}
            found.append(
                Rate(f"noise/{where}/gaussian-{sigma:g}/{target.name}", cases, ours, judge, long=sigma > FAINT)
            )
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            short = str(dtype).removeprefix("torch.")
            cases = {f"photo {i}": partial(rounded, network, activation, dtype, i, target) for i in range(N_PHOTOS)}
            long = dtype != torch.float32
            found.append(Rate(f"noise/{where}/{short}/{target.name}", cases, ours, judge, long=long))
    return found
