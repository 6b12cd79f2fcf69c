"""Suite `noise`: how often, how nearly a photo comes back from gradients with noise, of narrow types or of updates."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from bench import Outcome, Rate, Target
from leaks import Answer, Leak, judge, leak, ours, worst_psnr
from pictures import crops
from rconv_fast import defenses, gradients_from_update, models
from rconv_fast.observation import SharedGradients

SIGMAS = (1e-6, 1e-4, 1e-3, 1e-2)
FAINT = 1e-6  # above it, and behind a rounding to 16 bits, a photo takes a minute
NETWORKS = (("lenet_o", "leaky_relu"), ("cnn3", "relu"))
N_PHOTOS = 4
LEARNING_RATES = (0.1, 0.01)
LEVELS, N_PICTURES = 255, 20
LARGE = 64  # pixels: 12288 values, of which no information matrix is formed


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


def on_levels(index: int) -> torch.Tensor:
    """A photo as an 8-bit file has it, in float32."""
    return ((crops(N_PICTURES)[index : index + 1] * LEVELS).round() / LEVELS).float()


def updated(given: Leak, lr: float) -> Leak:
    """The same from the weights before and after one step of SGD, in the model's dtype."""
    before = {name: p.detach() for name, p in given.model.named_parameters()}
    after = {name: p - lr * given.gradients[name].to(p) for name, p in before.items()}
    given.gradients = gradients_from_update(before, after, lr=lr)
    return given


def stepped(lr: float, index: int, target: Target) -> Leak:
    """Weights in float32 before and after one step of SGD on an 8-bit picture."""
    model = models.MODELS["cnn3"]("relu", seed=index).float()
    return updated(leak(model, on_levels(index), torch.tensor([index]), target, arithmetic=torch.float32), lr)


def wide(index: int) -> nn.Sequential:
    """Three ReLU convolutions for pictures of 64 x 64."""
    torch.manual_seed(index)
    return nn.Sequential(
        nn.Conv2d(3, 32, 5, 2, 2), nn.ReLU(),
        nn.Conv2d(32, 64, 5, 2, 2), nn.ReLU(),
        nn.Conv2d(64, 128, 3, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(128 * 64, 10),
    )  # fmt: skip


def large(change: str, index: int, target: Target) -> Leak:
    """A photo of 64 x 64: weights after a step in float32, or gradients sent in float16."""
    model = wide(index)
    x = crops(N_PHOTOS, LARGE)[index : index + 1].float()
    given = leak(model, x, torch.tensor([index]), target, arithmetic=torch.float32)
    if change == "float16":
        given.gradients = {name: g.half() for name, g in given.gradients.items()}
        return given
    return updated(given, float(change.removeprefix("update-lr-")))


def halved(index: int, target: Target) -> Leak:
    """Gradients of an 8-bit picture, computed in float32 and sent in float16."""
    model = models.MODELS["cnn3"]("relu", seed=index)
    given = leak(model, on_levels(index), torch.tensor([index]), target, arithmetic=torch.float32)
    given.gradients = {name: g.half() for name, g in given.gradients.items()}
    return given


def byte_for_byte(answer: Answer) -> Outcome:
    """Success means every value on its own level; any on another level, or an answer beside the levels, is none."""
    given, found = answer
    quality = worst_psnr(answer)
    if found.inputs is None or quality != quality:
        return Outcome(False, quality, found.reason)
    levels, truth = found.inputs.double() * LEVELS, (given.x.double() * LEVELS).round()
    snapped = float((levels - levels.round()).abs().max()) < 1e-6
    equal = torch.equal(levels.round(), truth)
    if snapped and not equal:
        return Outcome(False, quality, "WRONG bytes said to be exact", found.verified)
    return Outcome(snapped, quality, "" if snapped else f"{quality:.0f} dB, not on the levels", found.verified)


def eight_bit(target: Target) -> list[Rate]:
    """Pictures of 8 bits behind three ReLU convolutions: recovered byte for byte, or not."""
    makers = {f"update-lr-{lr:g}": partial(stepped, lr) for lr in LEARNING_RATES} | {"float16": halved}
    exactly = partial(ours, quantum=1 / LEVELS)
    return [
        Rate(
            f"noise/8-bit/{name}/{target.name}",
            {f"photo {i}": partial(make, i, target) for i in range(N_PICTURES)},
            exactly,
            byte_for_byte,
            long=True,
        )
        for name, make in makers.items()
    ]


def entries(target: Target) -> list[Rate]:
    if target.dtype != torch.float64:
        return []
    found = eight_bit(target)
    for change in (*(f"update-lr-{lr:g}" for lr in LEARNING_RATES), "float16"):
        cases = {f"photo {i}": partial(large, change, i, target) for i in range(N_PHOTOS)}
        found.append(Rate(f"noise/64x64/{change}/{target.name}", cases, ours, judge, long=True))
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
