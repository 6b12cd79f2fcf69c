"""Single convolutions of a photo, with what an attacker knows of them, and our recovery of their input."""

from __future__ import annotations

import math
import resource
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rconv_fast
from bench import Outcome
from leaks import SUCCESS_PSNR
from pictures import photo

# First layers of well-known networks: filters, kernel, stride, padding.
STEMS = {"resnet": (64, 7, 2, 3), "vgg": (64, 3, 1, 1), "alexnet": (64, 11, 4, 2), "convnext": (96, 4, 4, 0)}


@dataclass
class Layer:
    """What is known of one convolution of a photo: both gradients, and the pre-activations where it is active."""

    x: Tensor
    weight: Tensor
    grad_weight: Tensor
    grad_output: Tensor
    output: Tensor
    known: Tensor
    stride: int
    padding: int

    def to(self, device: str) -> Layer:
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)


def layer(
    size: int,
    filters: int,
    kernel: int,
    stride: int,
    padding: int,
    *,
    relu: bool,
    channels: int = 3,
    seed: int = 0,
) -> Layer:
    """One convolution with torch's initialisation, then a random linear loss."""
    generator = torch.Generator().manual_seed(seed)
    bound = 1 / math.sqrt(channels * kernel**2)
    shape = (filters, channels, kernel, kernel)
    weight = (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) * bound
    weight.requires_grad_()
    x = photo(size)
    output = F.conv2d(x, weight, stride=stride, padding=padding)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64) / output[0, 0].numel()
    known = output.detach() > 0 if relu else torch.ones_like(output, dtype=torch.bool)
    grad = grad * known if relu else grad
    (grad_weight,) = torch.autograd.grad(output, weight, grad)
    return Layer(x, weight.detach(), grad_weight, grad, output.detach(), known, stride, padding)


def ours(given: Layer) -> tuple[Layer, Any]:
    found = rconv_fast.recover_conv_input(
        given.grad_weight,
        given.grad_output,
        given.x.shape[2:],
        weight=given.weight,
        output=given.output,
        known=given.known,
        stride=given.stride,
        padding=given.padding,
    )
    return given, found


def record(result: tuple[Layer, Any]) -> dict[str, Any]:
    given, found = result
    return {
        "psnr": float(rconv_fast.psnr(found.input, given.x)),
        "rows per unknown": found.rows / found.unknowns,
        "iterations": found.iterations,
        "solver": found.solver,
        "determined": float(found.determined.double().mean()),
        "peak MiB of the process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def judge(result: tuple[Layer, Any]) -> Outcome:
    """Success is an input near the truth; what is called determined and is not near it would be the worst failure."""
    given, found = result
    quality, proven = float(rconv_fast.psnr(found.input, given.x)), bool(found.determined.all())
    near = quality >= SUCCESS_PSNR
    why = "" if near else f"{'WRONG but determined, ' * proven}{quality:.0f} dB by {found.solver}"
    return Outcome(near, quality, why, proven, found.rows / found.unknowns, found.iterations)


def layers_of(model: nn.Sequential, x: Tensor, loss: Tensor | None = None) -> list[Layer]:
    """Every convolution of a chain with its true input, for a recipe that is given exact data of each."""
    values = [x]
    for module in model:
        values.append(module(values[-1]))
    loss = F.cross_entropy(values[-1], torch.tensor([3], device=x.device)) if loss is None else loss
    places = [i for i, module in enumerate(model) if isinstance(module, nn.Conv2d)]
    weights = [model[i].weight for i in places]
    found = torch.autograd.grad(loss, [*weights, *(values[i + 1] for i in places)])
    layers = []
    for i, grad_weight, grad_output in zip(places, found[: len(places)], found[len(places) :], strict=True):
        conv, output = model[i], values[i + 1].detach()
        bias = conv.bias.detach().reshape(1, -1, 1, 1)
        layers.append(
            Layer(
                values[i].detach(),
                conv.weight.detach(),
                grad_weight,
                grad_output,
                output - bias,
                output > 0,
                conv.stride[0],
                conv.padding[0],
            )
        )
    return layers
