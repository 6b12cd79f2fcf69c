"""Large inputs (algorithm 2): single layers and whole photos of 224 pixels, and how the cost grows.

``python benchmarks/run.py --filter large/``. The reference is the prototype's recipe: conjugate gradients on the
normal equations, Jacobi-scaled, in float64, products by ``torch.nn.grad``.
"""

from __future__ import annotations

import math
import resource
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from skimage import data
from skimage.transform import resize
from torch import Tensor, nn
from torch.nn import functional as F

import rconv_fast
from bench import Entry
from rconv_fast import models

# Iterations after which the plain recipe is stopped; it is reported as not converged.
PLAIN_ITERATIONS = 5000


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


def photo(size: int) -> Tensor:
    """The astronaut, antialiased to `size` pixels, (1, 3, size, size) in [0, 1]."""
    picture = resize(data.astronaut(), (size, size), anti_aliasing=True)
    return torch.from_numpy(picture).permute(2, 0, 1)[None].contiguous().double()


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


def plain(given: Layer) -> tuple[Tensor, int]:
    """Jacobi-scaled conjugate gradients in float64 on both blocks, each scaled to mean column norm 1."""
    grad, weight, shape = given.grad_output, given.weight, given.x.shape
    options: dict[str, Any] = {"stride": given.stride, "padding": given.padding}
    mask = given.known.double()

    def normal(b: float, x: Tensor) -> Tensor:
        rows = torch.nn.grad.conv2d_weight(x, weight.shape, grad, **options)
        outputs = F.conv2d(x, weight, **options) * mask
        return b * adjoint(rows) + torch.nn.grad.conv2d_input(shape, weight, outputs, **options)

    def adjoint(rows: Tensor) -> Tensor:
        return torch.nn.grad.conv2d_input(shape, rows, grad, **options)

    ones = torch.ones_like(weight)
    diagonal_b = torch.nn.grad.conv2d_input(shape, ones, grad.square(), **options)
    diagonal_a = torch.nn.grad.conv2d_input(shape, weight.square(), mask, **options)
    b = float(diagonal_a.mean() / diagonal_b.mean())
    diagonal = b * diagonal_b + diagonal_a
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0)  # black pixels that no equation meets
    right = b * adjoint(given.grad_weight)
    right = right + torch.nn.grad.conv2d_input(shape, weight, given.output * mask, **options)
    x = torch.zeros_like(given.x)
    r = right
    z = r * inverse
    p, gamma = z, float((r * z).sum())
    start, iteration = gamma, 0
    while gamma > 1e-28 * start and iteration < PLAIN_ITERATIONS:
        iteration += 1
        q = normal(b, p)
        alpha = gamma / float((p * q).sum())
        x, r = x + alpha * p, r - alpha * q
        z = r * inverse
        gamma, previous = float((r * z).sum()), gamma
        p = z + gamma / previous * p
    return x, iteration


@dataclass
class Photo:
    """A whole photo behind a network: what leaks, and the convolutions with their true inputs, for the reference."""

    model: nn.Sequential
    x: Tensor
    gradients: dict[str, Tensor]
    layers: list[Layer]

    def to(self, device: str) -> Photo:
        gradients = {name: g.to(device) for name, g in self.gradients.items()}
        return Photo(self.model.to(device), self.x.to(device), gradients, [given.to(device) for given in self.layers])


# Where the gradient constraints alone do not suffice.
HYBRID_LAYERS = 2


def photo_leak(model: nn.Sequential, dtype: torch.dtype) -> Photo:
    x = photo(224)
    values = [x]
    for module in model:
        values.append(module(values[-1]))
    loss = F.cross_entropy(values[-1], torch.tensor([3]))
    names, parameters = zip(*model.named_parameters(), strict=True)
    convolutions = [i for i, module in enumerate(model) if isinstance(module, nn.Conv2d)]
    outputs = [values[i + 1] for i in convolutions]
    found = torch.autograd.grad(loss, [*parameters, *outputs])
    gradients = {name: g.to(dtype) for name, g in zip(names, found, strict=False)}
    layers = []
    for i, grad_output in zip(convolutions, found[len(names) :], strict=True):
        conv, known = model[i], values[i + 1].detach() > 0
        bias = conv.bias.detach().reshape(1, -1, 1, 1)
        layers.append(
            Layer(
                values[i].detach(),
                conv.weight.detach(),
                found[names.index(f"conv{i // 2 + 1}.weight")],
                grad_output,
                values[i + 1].detach() - bias,
                known,
                conv.stride[0],
                conv.padding[0],
            )
        )
    return Photo(model, x, gradients, layers)


def prototype(given: Photo) -> list[Any]:
    """The prototype's recipe, each layer from exact data: `plain` where it takes both systems, else `plain_direct`."""
    hybrid, direct = given.layers[:HYBRID_LAYERS], given.layers[HYBRID_LAYERS:]
    return [*map(plain, hybrid), *map(plain_direct, direct)]


def plain_direct(given: Layer) -> Tensor:
    """Dense least squares by stride phases, all channels as right-hand sides."""
    channels, side = given.x.shape[1], given.x.shape[2]
    kernel, s, p = given.weight.shape[2], given.stride, given.padding
    dw = given.grad_weight.movedim(1, 3)  # (F, k, k, C)
    padded = F.pad(given.grad_output[0], (side, side, side, side))
    x = torch.empty(side, side, channels, dtype=dw.dtype, device=dw.device)
    for ry in range(s):
        for rx in range(s):
            taps = [(a, b) for a in range((ry + p) % s, kernel, s) for b in range((rx + p) % s, kernel, s)]
            rows = []
            for a, b in taps:  # g at u = (i + p - k) / s for all i of the phase
                first_y, first_x = (ry + p - a) // s + side, (rx + p - b) // s + side
                n_y, n_x = len(range(ry, side, s)), len(range(rx, side, s))
                rows.append(padded[:, first_y : first_y + n_y, first_x : first_x + n_x].flatten(1))
            right = torch.cat([dw[:, a, b] for a, b in taps])
            solved = torch.linalg.lstsq(torch.cat(rows), right).solution
            x[ry::s, rx::s] = solved.view(len(range(ry, side, s)), len(range(rx, side, s)), channels)
    return x.movedim(2, 0)[None]


def whole_photo(dtype: torch.dtype, device: str = "cpu") -> Photo:
    """A photo behind the all-ReLU network of method.md, section 4."""
    return photo_leak(models.cnn4_224("relu", dtype=torch.float64, seed=0), dtype).to(device)


def invert_photo(given: Photo) -> tuple[Tensor, Any]:
    return given.x, rconv_fast.invert(given.model, given.gradients, given.x.shape[1:])


def photo_record(result: tuple[Tensor, Any]) -> dict[str, Any]:
    x, found = result
    return {
        "psnr": float(rconv_fast.psnr(found.inputs, x)),
        "verified": found.verified,
        "gradient residual": found.gradient_residual,
        **{f"{r.name} ({r.solver}, {r.iterations})": r.seconds for r in found.layers},
        "peak MiB of the process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def whole(dtype: torch.dtype) -> Entry:
    name = f"large/photo-224/{str(dtype).removeprefix('torch.')}"
    exact = {"the prototype's recipe": prototype}
    references = exact if dtype == torch.float64 else {}
    return Entry(name, partial(whole_photo, dtype), invert_photo, references, record=photo_record, once=True)


# First layers of well-known networks: filters, kernel, stride, padding.
STEMS = {"resnet": (64, 7, 2, 3), "vgg": (64, 3, 1, 1), "alexnet": (64, 11, 4, 2), "convnext": (96, 4, 4, 0)}
GROWTH = (32, 64, 128, 256, 512)


def entries() -> list[Entry]:
    base = Entry("", lambda: None, ours, {"plain float64 Jacobi-CG": plain}, record=record, once=True)
    found = [
        replace(base, name=f"large/stem-224/{name}", setup=lambda s=sizes: layer(224, *s, relu=True))
        for name, sizes in STEMS.items()
    ]
    square = replace(base, name="large/square-224/3-12-k5-s2", setup=lambda: layer(224, 12, 5, 2, 2, relu=False))
    growth = [
        replace(
            base,
            name=f"large/growth/{size}",
            setup=lambda size=size: layer(size, *STEMS["vgg"], relu=True),
            references={},
            quick=size == 32,
        )
        for size in GROWTH
    ]
    return [*found, square, *growth, whole(torch.float64), whole(torch.float32)]
