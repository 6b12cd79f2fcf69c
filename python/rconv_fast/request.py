"""What was asked of an inversion, checked; and what follows from it alone: graphs, observation, copies of the model."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from rconv_fast.budget import Budget
from rconv_fast.errors import UnsupportedModelError, require, require_count, require_number, require_type
from rconv_fast.estimate import Grid, noise_of
from rconv_fast.layers.dropout import with_masks
from rconv_fast.losses import Loss
from rconv_fast.memory import require_memory
from rconv_fast.observation import Noise, Observation, SharedGradients
from rconv_fast.on_demand import OnDemand
from rconv_fast.rounding import rounding_of
from rconv_fast.solve import PRIORS
from rconv_fast.verdict import DOUBLE
from rconv_fast.walk.found import Pass
from rconv_fast.walk.graph import Graph
from rconv_fast.walk.opaque import opaque_graph
from rconv_fast.walk.reader import build_graph
from rconv_fast.wrappers import working_copy

# Noise below this share of the gradients leaves the equations true enough to be solved one layer after the other.
QUIET = 1e-6


@dataclass(frozen=True)
class Request:
    """What was asked, checked; the loss is that of the model's outputs.

    Where the gradients are those of several local steps, `model` is at the weights half way, `before` at the first.
    """

    model: nn.Module
    gradients: SharedGradients
    shape: tuple[int, ...]
    loss: Loss
    scale: float | None
    noise: float | Noise | None
    grid: Grid | None
    dtype: torch.dtype
    prior: str | None
    budget: Budget
    before: nn.Module | None = None

    def __post_init__(self) -> None:
        if self.scale is not None:
            require_number("invert", "scale", self.scale)
            must = "be positive and finite"
            require(sys.float_info.min <= self.scale < math.inf, "invert", "scale", must, self.scale)

    def graph(self, batch_size: int) -> Graph:
        """The model's steps for a batch of this size; one unknown step where it cannot be read."""
        try:
            return build_graph(self.model, self.gradients, self.shape, batch_size, self.dtype)
        except UnsupportedModelError as error:
            return opaque_graph(self.model, self.gradients, self.shape, batch_size, self.dtype, error.reason)

    @cached_property
    def observation(self) -> Observation:
        """The gradients in working precision."""
        device = next(self.model.parameters()).device
        rounding = rounding_of(*self.gradients.values()) / 2
        shared, dtype = self.gradients, self.dtype
        shapes = {name: g.shape for name, g in shared.items()}

        def working(name: str, part: slice) -> Tensor:
            return shared[name].detach().reshape(-1)[part].to(device=device, dtype=dtype)

        noise, source = self._noise(rounding)
        scale = float(self.scale) if self.scale is not None and self.gradients.scale_known else None
        return Observation(
            OnDemand(shapes, working), self.loss, noise=noise, rounding=rounding, scale=scale, source=source
        )

    def _noise(self, rounding: float) -> tuple[Noise, str]:
        """Given or recorded; that of coarse values; nothing for exact ones, whose noise is the arithmetic's."""
        if self.noise is None and self.gradients.noise is None and rounding < DOUBLE:
            return {}, self.gradients.source
        return noise_of(self.gradients, self.noise)

    @property
    def is_rounding(self) -> bool:
        """Whether the noise is nothing but the rounding of the values: none was stated or recorded."""
        return self.noise is None and self.gradients.noise is None

    @cached_property
    def is_loud(self) -> bool:
        """Whether the noise hides more than the equations' own rounding: an answer then needs error bars."""
        seen = self.observation
        if not seen.noise or self.is_rounding:
            return bool(seen.noise) and seen.rounding > QUIET
        noise2 = sum(float(seen.sigma(n).expand_as(g).square().sum()) for n, g in seen.gradients.items())
        size2 = sum(float(g.double().square().sum()) for g in seen.gradients.values())
        return noise2 > QUIET**2 * size2

    @cached_property
    def client(self) -> nn.Module | None:
        """The model in the precision the client computed in; None where that is the working precision."""
        return self._in(torch.float32) if dtype_of(self.model) == torch.float32 else None

    @cached_property
    def working_model(self) -> nn.Module:
        """The model in working precision, to run candidates through."""
        return self._in(self.dtype)

    def _in(self, dtype: torch.dtype) -> nn.Module:
        same = all(x.dtype == dtype for x in self.model.parameters())
        return self.model if same else working_copy(self.model, dtype)

    def masked(self, model: nn.Module, graph: Graph, passed: Pass) -> nn.Module:
        """A copy of the model that drops what a pass found dropped."""
        return with_masks(model, list(graph.masks(passed.values).values()))


def check_arguments(
    model: nn.Module,
    input_shape: Sequence[int],
    prior: str | None,
    batch_size: int | None,
    dtype: torch.dtype,
) -> tuple[int, ...]:
    """One sample's shape, once the arguments of `invert` are found to be of their kinds."""
    require_type(isinstance(model, nn.Module), "invert", "model", "be a torch.nn.Module", type(model).__name__)
    require(any(True for _ in model.parameters()), "invert", "model", "have parameters", "none")
    sized = isinstance(input_shape, Sequence) and all(isinstance(size, int) for size in input_shape)
    require_type(sized, "invert", "input_shape", "be a sequence of int", repr(input_shape))
    shape = tuple(input_shape)
    require(len(shape) >= 1 and min(shape) >= 1, "invert", "input_shape", "be one sample's shape", shape)
    require(prior is None or isinstance(prior, str), "invert", "prior", f"be one of {PRIORS}", repr(prior))
    require(prior in PRIORS, "invert", "prior", f"be one of {PRIORS}", repr(prior))
    if batch_size is not None:
        require_count("invert", "batch_size", batch_size)
    device = next(model.parameters()).device
    require_memory("invert", "a batch of inputs", 8 * (batch_size or 1) * math.prod(shape), device)
    floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    require_type(floating, "invert", "dtype", "be a real floating type", repr(dtype))
    return shape


def dtype_of(model: nn.Module) -> torch.dtype:
    """Of the first floating parameter."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())
