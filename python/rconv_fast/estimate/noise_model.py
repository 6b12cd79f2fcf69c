"""How noisy an observation is, entry by entry: as given, as recorded, or as the numbers themselves show.

A value that was rounded to a grid of spacing q has an error of standard deviation ``q / sqrt(12)``: half a unit in the
last place over sqrt(3). Values that lie on the coarser grid of a narrower type were rounded to it, whatever their dtype
says. Back-propagation in that arithmetic adds its own rounding, relative to the size of the tensor.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from rconv_fast.containers import read_tensor
from rconv_fast.errors import require, require_number, require_type
from rconv_fast.estimate.gradient_map import GradientMap
from rconv_fast.observation import Noise, Observation, SharedGradients
from rconv_fast.on_demand import TOGETHER, OnDemand, root_mean_square
from rconv_fast.rounding import rounded_to
from rconv_fast.updates import UNIFORM, spacing

# Rounding of back-propagation, in units of the type's own for a value of the tensor's root mean square.
BACKPROPAGATION = 4.0
# Runs of the client's arithmetic from which its share of the error bars is taken.
ARITHMETIC_RUNS = 4


def noise_of(
    gradients: Mapping[str, Tensor], noise: float | Noise | None = None, *, arithmetic: torch.dtype | None = None
) -> tuple[Mapping[str, Tensor], str]:
    """Standard deviation of every entry, and in words where it comes from.

    Parameters
    ----------
    gradients : mapping of str to Tensor
        As shared, in the dtype they were shared in; a `SharedGradients` brings its own noise.
    noise : float, mapping or None
        A number is relative to each tensor's root mean square; a mapping gives standard deviations by name; None:
        what the gradients record of themselves, else their rounding.
    arithmetic : torch.dtype, optional
        In which they were computed; found from the values if not given.

    Returns
    -------
    mapping of str to Tensor, str
        Standard deviations in float64, of each gradient's shape or a number, made when they are asked for; a phrase
        for the report.

    Raises
    ------
    ArgumentError
        If a standard deviation is negative or not finite, or has another shape.
    """
    arithmetic = rounded_to(gradients.values()) if arithmetic is None else arithmetic
    shapes = {name: g.shape for name, g in gradients.items()}
    size = functools.cache(lambda name: root_mean_square(gradients, name))
    floor = OnDemand(shapes, lambda name, part: _rounding(gradients[name].reshape(-1)[part], arithmetic, size(name)))
    own = gradients.noise if isinstance(gradients, SharedGradients) else None
    given, source = (noise, "given") if noise is not None else (own, "recorded with the gradients")
    if given is None:
        return floor, f"rounding of {str(arithmetic).removeprefix('torch.')}"
    if not isinstance(given, Mapping):
        require_number("invert", "noise", given)
        require(0 <= given < math.inf, "invert", "noise", "be finite and >= 0", given)
        given = {name: given * root_mean_square(gradients, name) for name in gradients}
    stated: dict[str, Tensor] = {}
    for name, g in gradients.items():
        sigma = read_tensor("invert", f"noise[{name!r}]", given.get(name, 0.0)).to(g.device)
        require_type(not sigma.is_complex(), "invert", f"noise[{name!r}]", "be real", sigma.dtype)
        valid = bool((sigma >= 0).all()) and not bool(sigma.isnan().any())
        require(valid, "invert", f"noise[{name!r}]", "be >= 0", "NaN or a negative number")
        fits = sigma.ndim == 0 or sigma.shape == g.shape
        require(fits, "invert", f"noise[{name!r}]", f"be a number or have shape {tuple(g.shape)}", tuple(sigma.shape))
        stated[name] = sigma

    def both(name: str, part: slice) -> Tensor:
        own = stated[name] if not stated[name].ndim else stated[name].reshape(-1)[part]
        return torch.hypot(own.double(), floor.part(name, part))

    return OnDemand(shapes, both), source


def arithmetic_noise(
    observation: Observation, model: nn.Module, client: nn.Module, inputs: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    """What the rounding of the client's arithmetic adds to each gradient: measured, by running both on one input.

    Parameters
    ----------
    observation : Observation
        Whose loss and scale.
    model, client : nn.Module
        Copies of the model in working precision and in the client's.
    inputs, targets : Tensor
        Near the answer: softmax - 1 loses digits where a sample is classified well.

    Returns
    -------
    dict of str to Tensor
        Root mean square difference of each tensor.
    """
    there = next(p for p in client.parameters() if p.is_floating_point())
    rounded = inputs.to(there.dtype)
    fine = observation.gradients_at(model, rounded.to(inputs.dtype), targets)
    coarse = observation.gradients_at(client, rounded, targets)
    return {name: (coarse[name].double() - g.double()).square().mean().sqrt() for name, g in fine.items()}


def with_arithmetic(
    observation: Observation, model: nn.Module, client: nn.Module | None, inputs: Tensor, targets: Tensor
) -> Observation:
    """The noise with what the client's arithmetic adds at these inputs; as it is where that is the working one."""
    if client is None:
        return observation
    added = arithmetic_noise(observation, model, client, inputs, targets)
    noise = {name: torch.hypot(observation.sigma(name), s) for name, s in added.items()}
    return replace(observation, noise=noise)


def arithmetic_variance(
    problem: GradientMap, client: nn.Module, x: Tensor, solve: Callable[[Tensor], Tensor], observation: Observation
) -> Tensor:
    """Variance that the client's arithmetic adds to each value: ``F^-1 J^T e`` for errors e of runs beside the answer.

    Its rounding is shared by many entries of a gradient, which no standard deviation an entry shows. Half of the
    variance is the value's own, half the mean, as the runs are few.
    """
    there = next(p for p in client.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    at = problem.at(x)
    total = torch.zeros_like(x)
    for _ in range(ARITHMETIC_RUNS):
        beside = x * (1 + 1e-6 * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(total))
        rounded = beside.to(there.dtype)
        fine = observation.gradients_at(problem.model, rounded.to(x), problem.targets)
        coarse = observation.gradients_at(client, rounded, problem.targets)
        errors = [coarse[name].to(total) - fine[name] for name in problem.parameters]
        total += solve(at.adjoint(problem.whiten(errors))).square() / ARITHMETIC_RUNS
    return (total + total.mean()) / 2


def entry_noise(observation: Observation, name: str) -> Tensor:
    """Standard deviation, at least float64's rounding; infinite where a tensor is all zero and nothing is stated."""
    g = observation.gradients[name]
    least = torch.finfo(torch.float64).eps * float(g.square().mean().sqrt())
    return observation.sigma(name).to(g).clamp_min(least if least > 0 else math.inf)


def capped(sigma: Tensor, cap: float) -> Tensor:
    """No entry less noisy than `cap` times the root mean square over its tensor."""
    finite = sigma[sigma.isfinite()]
    return sigma.clamp_min(cap * float(finite.square().mean().sqrt())) if finite.numel() > 1 else sigma


def _rounding(g: Tensor, arithmetic: torch.dtype, size: float) -> Tensor:
    """Of values of a tensor of this root mean square, and of the arithmetic that made them."""
    # float16 and bfloat16 are what gradients are stored in; they are computed in float32.
    computed = torch.float64 if arithmetic == torch.float64 else torch.float32
    shared = torch.as_tensor(BACKPROPAGATION * torch.finfo(computed).eps / 2 * size, dtype=torch.float64)
    noise = torch.empty_like(g, dtype=torch.float64)
    for part, values in zip(noise.split(TOGETHER), g.split(TOGETHER), strict=True):
        part.copy_(torch.hypot(spacing(values.double(), arithmetic) / UNIFORM, shared))
    return noise
