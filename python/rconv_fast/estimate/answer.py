"""The joint estimate of one reading of the head: a start, the noise of the arithmetic there, the estimate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from rconv_fast.budget import Budget
from rconv_fast.errors import LinAlgError
from rconv_fast.estimate.bounds import DENSE_UP_TO
from rconv_fast.estimate.by_products import estimate_by_products
from rconv_fast.estimate.gradient_map import GradientMap
from rconv_fast.estimate.joint import CAPS, Estimate, estimate, first_bits
from rconv_fast.estimate.noise_model import capped, with_arithmetic
from rconv_fast.estimate.recursion import noisy_start
from rconv_fast.observation import Observation
from rconv_fast.patterns.pattern import Pattern

# Values of the inputs up to which a joint estimate is made (49152: 128 x 128 x 3).
JOINT_UP_TO = 50_000


def joint_answer(
    model: nn.Module,
    observation: Observation,
    targets: Tensor,
    known: Mapping[str, Tensor],
    shape: torch.Size,
    inputs: Tensor | None,
    budget: Budget,
    *,
    good: bool = False,
    free_scale: bool = False,
    client: nn.Module | None = None,
    measure: bool = False,
) -> Estimate | None:
    r"""The most likely inputs, from the better of two starts.

    Parameters
    ----------
    model : nn.Module
        A working copy in working precision.
    observation : Observation
        With its noise, and a scale.
    targets : Tensor
        Labels or targets.
    known : mapping of str to Tensor
        Inputs of the last layers that a reading of the head found, by step name.
    shape : torch.Size
        (B, \*input_shape), at most `JOINT_UP_TO` values.
    inputs : Tensor or None
        What the exact recursion found.
    budget : Budget
        When to end.
    good : bool
        Whether `inputs` fit the gradients already: no other start is looked for.
    free_scale : bool
        Whether the scale is to be estimated too.
    client : nn.Module, optional
        The model in the client's precision, for the error that its arithmetic adds.
    measure : bool
        Whether the noise is nothing but the client's rounding: it is then measured near the start.

    Returns
    -------
    Estimate or None
        None where there is no start, or where something is wholly open.
    """
    sigma = {name: observation.sigma(name) for name in observation.gradients}
    problem = GradientMap.read(
        model, observation.loss, targets, observation.gradients, sigma, shape, observation.factor
    )
    proposed = [] if good else [_start(problem, known, budget)]
    found = [start for start in proposed if start is not None]
    runs = [x for x, _ in found] + ([] if inputs is None else [inputs])
    starts: list[tuple[Tensor, Pattern | None]] = [*found, *((x, None) for x in runs)]
    if not starts:
        return None
    start, pattern = starts[0] if len(starts) == 1 else min(starts, key=lambda s: _misfit(problem, *s))
    if measure:
        observation = with_arithmetic(observation, model, client, start, targets)
    way = estimate if shape.numel() <= DENSE_UP_TO else estimate_by_products
    try:
        return way(
            model, observation, start, targets, pattern=pattern, free_scale=free_scale, client=client, budget=budget
        )
    except LinAlgError:  # something is wholly open, so that there is no information matrix to work with
        return None


def _misfit(problem: GradientMap, x: Tensor, pattern: Pattern | None) -> float:
    """chi^2 with the activations on the sides of the pattern, or where a run on x puts them."""
    return (problem if pattern is None else problem.held(first_bits(problem, x, pattern))).chi2(x)


def _start(problem: GradientMap, known: Mapping[str, Tensor], budget: Budget) -> tuple[Tensor, Pattern] | None:
    try:
        sigma = {name: capped(s, CAPS[0]) for name, s in problem.sigma.items()}
        return noisy_start(replace(problem, sigma=sigma), known, budget)
    except LinAlgError:  # samples of which the gradient holds a sum only
        return None
